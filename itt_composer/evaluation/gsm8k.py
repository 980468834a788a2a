"""``itt eval --task gsm8k``: exact match of generated answers, through lm-eval.

The prompt is that of lm-eval's task, which fine-tuning uses too (:mod:`itt_composer.config.examples`). Decoding is
greedy, in batches padded on the left, from a cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from itt_composer.atomic import write_text
from itt_composer.config.examples import check_examples
from itt_composer.evaluation.score import exported_models, folder_name
from itt_composer.ratios import ratios_key

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TASK = 'gsm8k'
MAX_ANSWER = 512
"""Most tokens of an answer: about 4 in 100 of GSM8K's have more than lm-eval's 256."""
CONTEXTS = {False: 1024, True: 2048}
"""Tokens of prompt and answer, without and with few-shot examples, where the model has as many positions."""
METRICS = {'exact match, %': 'strict-match', 'last number, %': 'flexible-extract'}


def main(
    model: list[Path],
    eval_data: Path | None = None,
    token_ratios: str | None = None,
    selection: str | None = None,
    shots: int = 0,
    chat: bool = False,
    out: Path | None = None,
    limit: int | None = None,
    batch_tokens: int | None = None,
) -> None:
    """Score each model, dense, Loop or ITT, and write a row for each; scores are fractions."""
    out = out or Path('eval_results') / f'{TASK}_{folder_name(model, token_ratios, selection, limit)}'
    options = {'token_ratios': token_ratios, 'selection': selection, 'batch_tokens': batch_tokens}
    rows: list[dict[str, Any]] = []
    with exported_models(model, token_ratios, selection, out / f'{TASK}.csv') as (folders, scratch):
        tasks = task_file(eval_data, scratch / 'tasks', shots)
        for path, folder in zip(model, folders, strict=True):
            rows.append({'model': str(path), **score(folder, tasks, shots, chat, limit, options)})
            write_text(pd.DataFrame(rows).to_csv(index=False), out / f'{TASK}.csv')
    console = Console()
    console.print(table(rows))
    console.print(str(out / f'{TASK}.csv'), highlight=False)


def task_file(eval_data: Path | None, scratch: Path, shots: int) -> TaskManager:
    """Return lm-eval's task on the documents in ``eval_data/gsm8k``, or on the hub's.

    Raises:
        ValueError: no test.jsonl there, a line that is no question with an answer, or fewer examples than ``shots``.
    """
    from lm_eval.tasks import TaskManager

    from itt_composer.evaluation.local_tasks import LM_EVAL_TASKS, from_files, write_task

    if eval_data is None:
        return TaskManager()
    folder = eval_data.resolve() / TASK
    for file in (folder / 'test.jsonl', folder / 'train.jsonl'):
        if file.is_file() or file.stem == 'test':
            count = check_examples(file, 'itt_composer.config.examples:plain') - (file.stem == 'test')
            source = file
    if shots > count:
        raise ValueError(f'shots: expected at most {count}, the number of other questions in {source}, got {shots}')
    scratch.mkdir()
    write_task(scratch, TASK, {'task': TASK, **from_files(LM_EVAL_TASKS / TASK / 'gsm8k.yaml', folder, 'train')})
    return TaskManager(include_path=str(scratch), include_defaults=False)


def score(
    folder: Path, tasks: TaskManager, shots: int, chat: bool, limit: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Run lm-eval on an exported folder.

    Raises:
        ValueError: no model in it, options that it does not have, or a selection that is not causal.
    """
    from lm_eval import simple_evaluate

    from itt_composer.evaluation.harness import ITTLM
    from itt_composer.export.check import read_folder_config

    positions = read_folder_config(folder).max_position_embeddings
    lm = ITTLM(str(folder), max_length=min(positions, CONTEXTS[shots > 0]), **options)
    results = simple_evaluate(
        lm,
        tasks=[TASK],
        task_manager=tasks,
        num_fewshot=shots,
        apply_chat_template=chat,
        gen_kwargs={'max_gen_toks': min(MAX_ANSWER, lm.max_length // 2)},
        limit=limit,
        log_samples=False,
    )
    assert results is not None, 'one process'
    found = results['results'][TASK]
    return {
        'selection': lm.selection or 'none',
        'token_ratios': ratios_key(lm.token_ratios) or 'none',
        'shots': shots,
        'chat': chat,
        'examples': results['n-samples'][TASK]['effective'],
        **{
            f'{metric.replace("-", "_")}{suffix}': found[f'exact_match{suffix},{metric}']
            for metric in METRICS.values()
            for suffix in ('', '_stderr')
        },
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the scores, for the terminal."""
    shown = Table('model', 'selection', 'token ratios', *METRICS, 'examples', title=f'GSM8K, {rows[0]["shots"]} shots')
    shown.caption = '± standard error over the examples'
    for row in rows:
        cells = [_percent(row, metric.replace('-', '_')) for metric in METRICS.values()]
        shown.add_row(row['model'], row['selection'], row['token_ratios'], *cells, str(row['examples']))
    return shown


def _percent(row: dict[str, Any], metric: str) -> str:
    error = row[f'{metric}_stderr']
    return f'{100 * row[metric]:.1f}' + ('' if isinstance(error, str) else f' ± {100 * error:.1f}')
