"""``itt eval``: the paper's ten tasks, and their scores as a row of Table 1."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from itt_composer.atomic import check_writable
from itt_composer.config.files import yamls_folder
from itt_composer.evaluation.table1 import Scores, paper_row, table, write_row, write_scores
from itt_composer.one_line import one_line_errors
from itt_composer.paper.tasks import GROUP

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# Keys of config.json that do not describe the model.
NOT_OF_THE_MODEL = {'_name_or_path', 'transformers_version', 'torch_dtype', 'calibrated_thresholds'}


def main(
    model: list[Path],
    eval_data: Path | None = None,
    token_ratios: str | None = None,
    selection: str | None = None,
    row: str | None = None,
    out: Path | None = None,
    limit: int | None = None,
    batch_tokens: int | None = None,
) -> None:
    """Score the models on the tasks of Table 1 and write the row."""
    out = out or Path('eval_results') / folder_name(model, token_ratios, selection, limit)
    options: dict[str, Any] = {'token_ratios': token_ratios, 'selection': selection, 'batch_tokens': batch_tokens}
    scores: list[Scores] = []
    with exported_models(model, token_ratios, selection, out / 'table1.csv') as (folders, scratch):
        check_same_model(model, folders)
        tasks = task_files(eval_data, scratch / 'tasks')
        for path, folder in zip(model, folders, strict=True):
            scores.append(score(path, folder, tasks, limit, options))
            write_scores(scores, out / 'scores.csv')
        row = row or paper_row(scores[0].config)
    console = Console()
    console.print(table(scores, row))
    write_row(scores, row, out / 'table1.csv')
    console.print(f'{out / "table1.csv"}, {out / "scores.csv"}', highlight=False)


def folder_name(models: list[Path], token_ratios: str | None, selection: str | None, limit: int | None) -> str:
    """Return a name for what is scored and how, so that a trial does not replace a result."""
    names = [models[0].as_posix(), f'and_{len(models) - 1}_more' if models[1:] else '', token_ratios, selection]
    given = [name.strip('./').replace('/', '-') for name in names if name]
    return '_'.join([*given, *([] if limit is None else [f'limit_{limit}'])])


@contextmanager
def exported_models(
    models: list[Path], token_ratios: str | None, selection: str | None, table: Path
) -> Iterator[tuple[list[Path], Path]]:
    """Yield the folder of each model, of a checkpoint its export, and an empty folder; both go afterwards.

    Every model is complete and has these options, and ``table`` can be written, before the first one is scored. An
    error ends the process with one line.
    """
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    # Only the standard error of a perplexity, which no table of ours has, is bootstrapped. lm-eval forks a pool for it,
    # and a fork of a process with PyTorch's threads may wait for ever.
    os.environ['DISABLE_MULTIPROC'] = '1'
    from itt_composer.evaluation.harness import check_thinking
    from itt_composer.export.check import check_exported
    from itt_composer.export.folder import export

    with one_line_errors('eval'):
        check_writable(table)
        with tempfile.TemporaryDirectory() as name:
            scratch, folders = Path(name), []
            for i, model in enumerate(models):
                exported = (model / 'config.json').is_file()
                folders.append(model if exported else export(model, scratch / str(i)))
                check_exported(folders[i])
                check_thinking(folders[i], token_ratios, selection)
            yield folders, scratch


def check_same_model(models: list[Path], folders: list[Path]) -> None:
    """Check that the folders differ in their weights alone, so that a mean over them is one over seeds.

    Raises:
        ValueError: the first key of ``config.json`` that differs.
    """
    first, *others = (json.loads((folder / 'config.json').read_text()) for folder in folders)
    for model, config in zip(models[1:], others, strict=True):
        for key in sorted((first.keys() | config.keys()) - NOT_OF_THE_MODEL):
            if first.get(key) != config.get(key):
                raise ValueError(
                    f'{model}: {key}: expected {first.get(key)} as in {models[0]}, got {config.get(key)}; several '
                    'models are averaged, so pass seeds of one model, and other models in a command of their own'
                )


def task_files(eval_data: Path | None, scratch: Path) -> TaskManager:
    """Return the paper's tasks on the documents in ``eval_data``, by files written to ``scratch``, or on the hub's.

    Raises:
        ValueError: no documents in it.
    """
    from lm_eval.tasks import TaskManager

    from itt_composer.evaluation.local_tasks import write_task_files

    if eval_data is None:
        return TaskManager(include_path=str(yamls_folder() / 'eval' / 'lm_eval'))
    write_task_files(eval_data, scratch)
    return TaskManager(include_path=str(scratch), include_defaults=False)


def score(model: Path, folder: Path, tasks: TaskManager, limit: int | None, options: dict[str, Any]) -> Scores:
    """Run lm-eval on an exported folder; ``model`` is its name in the table.

    Raises:
        ValueError: no model in it, or options that the model does not have.
    """
    from lm_eval import simple_evaluate

    from itt_composer.evaluation.harness import ITTLM

    lm = ITTLM(str(folder), **options)
    results = simple_evaluate(
        lm, tasks=[GROUP], task_manager=tasks, limit=limit, log_samples=False, bootstrap_iters=1000
    )
    assert results is not None, 'one process'
    return Scores(
        model=str(model),
        config=lm.config.to_dict(),
        selection=lm.selection,
        token_ratios=lm.token_ratios,
        tasks=results['results'],
        limit=limit,
        examples_scored=examples_scored(results['configs']),
    )


def examples_scored(configs: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Return the tasks, by the configs in lm-eval's results, whose examples are of the split that is scored."""
    found = set()
    for name, config in configs.items():
        scored = config.get('test_split') or config.get('validation_split')
        examples = config.get('fewshot_split') or config.get('training_split') or config.get('validation_split')
        if config.get('num_fewshot') and examples == scored:
            found.add('mmlu' if name.startswith('mmlu_') else name)
    return tuple(sorted(found))
