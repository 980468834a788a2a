"""The documents in the form of foundry's in-context-learning tasks, with the prompts that lm-eval makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from itt_composer.atomic import atomic_folder
from itt_composer.evaluation.local_tasks import TASK_FILES
from itt_composer.paper.tasks import PaperTask

FOUNDRY_FILES = 'foundry'


def write_foundry_files(data: Path, present: list[PaperTask]) -> None:
    """Write ``<data>/foundry/<task>.jsonl`` for the tasks in ``present``, from lm-eval's definitions of them."""
    manager = TaskManager(include_path=str(data / TASK_FILES), include_defaults=False)
    with atomic_folder(
        data / FOUNDRY_FILES, own=lambda there: all(file.suffix == '.jsonl' for file in there.iterdir())
    ) as folder:
        for paper_task in present:
            tasks = manager.load([paper_task.name])['tasks']
            lines = [json.dumps(row) + '\n' for name, task in tasks.items() for row in _rows(task, name)]
            (folder / f'{paper_task.name}.jsonl').write_text(''.join(lines), encoding='utf-8')


def _rows(task: Any, name: str) -> Iterator[dict[str, Any]]:
    assert isinstance(task, Task)
    for document in task.test_docs():
        text, target = task.doc_to_text(document), task.doc_to_target(document)
        if task.OUTPUT_TYPE == 'loglikelihood':
            yield {'context': text, 'continuation': str(target).strip()}
        elif task.multiple_input:
            yield {'context_options': task.doc_to_choice(document), 'continuation': target, 'gold': text}
        else:
            category = {'category': name.removeprefix('mmlu_')} if name.startswith('mmlu_') else {}
            yield {'query': text, 'choices': task.doc_to_choice(document), 'gold': target, **category}
