"""``python -m itt_composer.evaluation``: the paper's ten tasks, and their scores as a row of Table 1."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from itt_composer.evaluation.paper import GROUP, REPOSITORY_TASKS, paper_rows
from itt_composer.evaluation.table1 import Scores, paper_row, table, write_csv
from itt_composer.thinking_options import check_choice
from itt_composer.whole_folder import check_writable

# What a folder's config.json says beside what the model is.
NOT_OF_THE_MODEL = {'_name_or_path', 'transformers_version', 'torch_dtype', 'calibrated_thresholds'}


def main(
    model: Annotated[list[Path], typer.Option(help='Exported folder or checkpoint; several are seeds of one model.')],
    eval_data: Annotated[
        Path | None, typer.Option(help='Folder that make eval-data wrote; without it, the data sets of the hub.')
    ] = None,
    token_ratios: Annotated[str | None, typer.Option(help='0.7/0.7/0.9; without it, the model’s.')] = None,
    selection: Annotated[str | None, typer.Option(help='Routing rule; without it, the model’s for evaluation.')] = None,
    row: Annotated[str | None, typer.Option(help='Row of Table 1 to set beside; without it, the nearest.')] = None,
    out: Annotated[Path, typer.Option(help='Folder for table1.csv and scores.csv.')] = Path('eval_results'),
    limit: Annotated[int | None, typer.Option(help='Only so many documents of each task.')] = None,
    batch_tokens: Annotated[int | None, typer.Option(help='Tokens of one forward pass.')] = None,
) -> None:
    """Score the models on the tasks of Table 1 and write the row."""
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    try:
        check_writable(out / 'table1.csv')
        if row is not None:
            check_choice('row', row, list(paper_rows()))
        options: dict[str, Any] = {'token_ratios': token_ratios, 'selection': selection, 'batch_tokens': batch_tokens}
        with tempfile.TemporaryDirectory() as scratch:
            folders = [exported(path, Path(scratch) / str(i)) for i, path in enumerate(model)]
            check_same_model(model, folders)
            scores = [
                score(path, folder, eval_data, limit, options) for path, folder in zip(model, folders, strict=True)
            ]
        row = row or paper_row(scores[0].config)
    except (ValueError, OSError) as error:
        sys.exit(f'eval: {error}')
    console = Console()
    console.print(table(scores, row))
    for file in write_csv(scores, row, out):
        console.print(str(file), highlight=False)


def exported(model: Path, scratch: Path) -> Path:
    """The folder itself where it is an exported one, else the checkpoint's export in ``scratch``."""
    from itt_composer.export import export

    return model if (model / 'config.json').is_file() else export(model, scratch)


def check_same_model(models: list[Path], folders: list[Path]) -> None:
    """See that the folders differ in nothing but their weights, so that a mean over them is one over seeds.

    Raises:
        ValueError: the first key of ``config.json`` that differs.
    """
    first, *others = (json.loads((folder / 'config.json').read_text()) for folder in folders)
    for model, config in zip(models[1:], others, strict=True):
        for key in sorted((first.keys() | config.keys()) - NOT_OF_THE_MODEL):
            if first.get(key) != config.get(key):
                raise ValueError(
                    f'{model}: {key} is {config.get(key)}, and {first.get(key)} in {models[0]}; several models are '
                    'averaged, so give seeds of one model, and others in a call of their own'
                )


def score(model: Path, folder: Path, eval_data: Path | None, limit: int | None, options: dict[str, Any]) -> Scores:
    """Run lm-eval on an exported folder; ``model`` is what the table calls it.

    Raises:
        ValueError: no model or no data there, or options that the model does not have.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from itt_composer.evaluation.harness import ITTLM
    from itt_composer.evaluation.local_tasks import TASK_FILES, write_task_files

    if eval_data is None:
        manager = TaskManager(include_path=str(REPOSITORY_TASKS))
    else:
        write_task_files(eval_data)
        manager = TaskManager(include_path=str(eval_data / TASK_FILES), include_defaults=False)
    lm = ITTLM(str(folder), **options)
    # Only the standard error of a perplexity, which no table of ours has, is bootstrapped. lm-eval forks a pool for it,
    # and a fork of a process with PyTorch's threads may wait for ever.
    os.environ['DISABLE_MULTIPROC'] = '1'
    results = simple_evaluate(
        lm, tasks=[GROUP], task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
    )
    assert results is not None
    return Scores(str(model), lm.config.to_dict(), lm.selection, lm.token_ratios, results['results'])


if __name__ == '__main__':
    typer.run(main)
