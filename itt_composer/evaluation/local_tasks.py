"""lm-eval's own task definitions, read from local files.

A task file made here includes lm-eval's and replaces only the source of the documents. The folder with the data::

    <data>/<task>/test.jsonl                the documents that are scored, with the fields of lm-eval's data set
    <data>/<task>/train.jsonl               where few-shot examples come from; without it, from the other test documents
    <data>/mmlu/<subject>/test.jsonl, dev.jsonl
    <data>/lm_eval/*.yaml                   written here; for lm_eval's --include_path
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml

from itt_composer.atomic import atomic_folder
from itt_composer.paper.tasks import GROUP, PaperTask, paper_tasks

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
TASK_FILES = 'lm_eval'


def write_task_files(data: Path, folder: Path | None = None) -> list[PaperTask]:
    """Write the task files of ``data``, and the group ``itt_paper`` of the tasks that have data in it.

    Args:
        data: the folder with the documents; the task files point into it.
        folder: where to write; default ``<data>/lm_eval``.

    Returns:
        The tasks that have data.

    Raises:
        ValueError: no task has data.
    """
    data = data.resolve()
    folder = folder or data / TASK_FILES
    present = [task for task in paper_tasks() if _has_data(task, data)]
    if not present:
        names = ', '.join(task.name for task in paper_tasks())
        raise ValueError(f'{data}: no <task>/test.jsonl for any of {names}; write them: itt eval-data --source ...')
    with atomic_folder(folder, own=lambda there: all(file.suffix == '.yaml' for file in there.iterdir())) as scratch:
        _write_tasks(present, data, scratch)
    return present


def _write_tasks(present: list[PaperTask], data: Path, folder: Path) -> None:
    members: list[dict[str, Any]] = []
    for task in present:
        if task.name == 'mmlu':
            for subject in mmlu_subjects():
                source = LM_EVAL_TASKS / Path(task.definition).with_name(f'mmlu_{subject}.yaml')
                definition = from_files(source, data / 'mmlu' / subject, 'dev')
                write_task(folder, f'mmlu_{subject}', {'task': f'mmlu_{subject}', **definition})
            subjects = [f'mmlu_{subject}' for subject in mmlu_subjects()]
            average = [{'metric': 'acc', 'weight_by_size': True}]
            write_task(folder, 'mmlu', {'group': 'mmlu', 'task': subjects, 'aggregate_metric_list': average})
            members.append({'group': 'mmlu', 'num_fewshot': task.shots})
        else:
            definition = from_files(LM_EVAL_TASKS / task.definition, data / task.name, 'train')
            write_task(folder, task.name, {'task': task.name, **definition})
            members.append({'task': task.name, 'num_fewshot': task.shots})
    average = [{'metric': 'acc', 'weight_by_size': False}]
    write_task(folder, GROUP, {'group': GROUP, 'task': members, 'aggregate_metric_list': average})


def mmlu_subjects() -> list[str]:
    """Return the 57 subjects, as lm-eval's file names have them."""
    return sorted(file.stem.removeprefix('mmlu_') for file in (LM_EVAL_TASKS / 'mmlu' / 'default').glob('mmlu_*.yaml'))


def _has_data(task: PaperTask, data: Path) -> bool:
    folders = [data / 'mmlu' / subject for subject in mmlu_subjects()] if task.name == 'mmlu' else [data / task.name]
    return all((folder / 'test.jsonl').is_file() for folder in folders)


def from_files(definition: Path, folder: Path, examples: str) -> dict[str, Any]:
    """Return the task ``definition`` with its documents from ``folder``, and examples from its ``<examples>.jsonl``."""
    files = {'test': str(folder / 'test.jsonl')}
    if (folder / f'{examples}.jsonl').is_file():
        files[examples] = str(folder / f'{examples}.jsonl')
    return {
        'include': str(definition),
        'dataset_path': 'json',
        'dataset_name': None,
        'dataset_kwargs': {'data_files': files},
        'training_split': None,
        'validation_split': None,
        'test_split': 'test',
        # lm-eval leaves the question itself out of its examples only where it knows that both are of one split.
        'fewshot_split': examples if examples in files else 'test',
    }


def write_task(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a task file for lm-eval."""
    (folder / f'{name}.yaml').write_text(yaml.safe_dump(content, sort_keys=False))
