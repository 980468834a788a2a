"""What a training config leaves to the evaluation data: which in-context-learning tasks have a fitting file there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from itt_composer.checks import json_lines
from itt_composer.data_folder import read_tokenizer

log = logging.getLogger(__name__)


def fill_in_tasks(config: DictConfig) -> None:
    """Leave out the tasks that cannot be run, from the gauntlet too, and say which; cut the others to the context.

    Those are the tasks without data, and those with an answer that fills the context, at which foundry would end.

    Raises:
        ValueError: the config has tasks and none of them can be run.
    """
    tasks = config.get('icl_tasks')
    if not tasks:
        return
    present = [task for task in tasks if '://' in task.dataset_uri or Path(task.dataset_uri).is_file()]
    absent = [task.label for task in tasks if task not in present]
    if not present:
        raise ValueError(
            f'icl_tasks: no data for {", ".join(absent)}, for example {tasks[0].dataset_uri}; '
            'run: itt eval-data, or set variables.eval_data=<dir>'
        )
    if absent:
        log.warning('evaluation tasks whose data is missing: %s', ', '.join(absent))
    longest = config.get('icl_seq_len') or config.max_seq_len
    for task in present:
        task.max_seq_len = min(task.get('max_seq_len') or longest, longest)
    tokenizer = Path(config.variables.get('data', '')) / 'tokenizer'
    known = (tokenizer / 'tokenizer.json').is_file()
    too_long = [task.label for task in present if known and _outgrows_context(task, tokenizer)]
    if too_long:
        log.warning('evaluation tasks with an answer as long as their context: %s', ', '.join(too_long))
        if len(too_long) == len(present):
            raise ValueError(f'icl_seq_len: {longest} tokens hold no answer of {", ".join(too_long)}; make it longer')
    absent += too_long
    config.icl_tasks = [task for task in present if task.label not in too_long]
    gauntlet = config.get('eval_gauntlet')
    if gauntlet:
        for category in gauntlet.categories:
            category.benchmarks = [task for task in category.benchmarks if task.name not in absent]
        gauntlet.categories = [category for category in gauntlet.categories if category.benchmarks]


def _outgrows_context(task: DictConfig, tokenizer_folder: Path) -> bool:
    if '://' in task.dataset_uri:
        return False
    answers = [answer for _, of_row in json_lines(Path(task.dataset_uri), _answers) for answer in of_row]
    # Hardly any answer is longer than the context in bytes, and none has more tokens than bytes.
    long = [answer for answer in answers if len(f' {answer}'.encode()) >= task.max_seq_len]
    if not long:
        return False
    tokenizer = read_tokenizer(tokenizer_folder)
    return any(len(tokenizer.encode(f' {answer}', add_special_tokens=False)) >= task.max_seq_len for answer in long)


def _answers(row: dict[str, Any]) -> list[str]:
    """The texts of a row that are fed to the model as answers; none of a generation task."""
    answers = row.get('choices') or list(filter(None, [row.get('continuation')]))
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f'expected texts in choices or continuation, got {answers!r:.100}')
    return answers
