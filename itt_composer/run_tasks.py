"""What a run file leaves to the evaluation data: which of its in-context-learning tasks have a file there."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

log = logging.getLogger(__name__)


def fill_in_tasks(config: DictConfig) -> None:
    """Leave out the tasks whose data is absent, from the gauntlet too, and say which; cut the others to the context.

    Raises:
        ValueError: the config has tasks and none of them has data.
    """
    tasks = config.get('icl_tasks')
    if not tasks:
        return
    present = [task for task in tasks if '://' in task.dataset_uri or Path(task.dataset_uri).is_file()]
    absent = [task.label for task in tasks if task not in present]
    if not present:
        raise ValueError(
            f'icl_tasks: no data for {", ".join(absent)}, for example {tasks[0].dataset_uri}; '
            'run: make eval-data SOURCE= OUT=, or set variables.eval_data=<dir>'
        )
    if absent:
        log.warning('evaluation tasks whose data is absent: %s', ', '.join(absent))
    longest = config.get('icl_seq_len') or config.max_seq_len
    for task in present:
        task.max_seq_len = min(task.get('max_seq_len') or longest, longest)
    config.icl_tasks = present
    gauntlet = config.get('eval_gauntlet')
    if gauntlet:
        for category in gauntlet.categories:
            category.benchmarks = [task for task in category.benchmarks if task.name not in absent]
        gauntlet.categories = [category for category in gauntlet.categories if category.benchmarks]
