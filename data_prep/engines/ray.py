"""The engine for a Ray cluster: each work item is a task. Ray schedules, places, and repeats what died in its process.

Every machine must see the source and OUT under the same paths, and have this package installed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from data_prep.cpus import usable_cpus
from data_prep.engines.progress import Progress
from data_prep.tokens.document_tokenizer import load_document_tokenizer
from data_prep.work_item import Recipe, WorkItem, WorkItemRecord, convert_work_item

_POLL_SECONDS = 0.5
# How often a task is started again after its process or machine died.
_RETRIES = 3
# One process is one core: the tokenizer's own threads would only compete with the other processes.
_ENVIRONMENT = {'TOKENIZERS_PARALLELISM': 'false'}


def run(recipe: Recipe, records: Mapping[WorkItem, WorkItemRecord | None], workers: int | None) -> None:
    """``run_work_items`` on the cluster that ``RAY_ADDRESS`` names, or on one of ``workers`` processes started here."""
    try:
        import ray
    except ImportError as error:
        raise ValueError('--engine: ray is not installed; pip install ray, or pass --engine local') from error
    if 'RAY_ADDRESS' in os.environ and workers is not None:
        raise ValueError('--workers: the cluster that RAY_ADDRESS names has its own workers; leave --workers out')
    try:
        ray.init(
            # None where a cluster is running: it has its own.
            num_cpus=workers or (None if 'RAY_ADDRESS' in os.environ else usable_cpus()),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={'env_vars': _ENVIRONMENT},
        )
    except Exception as error:  # Ray's own for a slow start has no class of its own
        raise RuntimeError(
            f'--engine: Ray did not start, or was not reached ({error}); a busy machine can be too slow for it: '
            'run the same command again, or pass --engine local'
        ) from error
    try:
        with Progress(recipe, records) as progress:
            task = ray.remote(max_retries=_RETRIES)(_work)
            shared = ray.put(recipe)
            item_of = {task.remote(shared, item): item for item in progress.items}
            pending, read_bytes, tokens = list(item_of), 0, 0
            while pending:
                done, pending = ray.wait(pending, timeout=_POLL_SECONDS)
                for reference in done:
                    record = ray.get(reference)
                    read_bytes += item_of[reference].bytes
                    tokens += record.tokens
                    progress.add(record)
                progress.show(read_bytes, tokens)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f'Ray gave up on a task ({type(error).__name__}); the same command continues from the last work item'
        ) from error
    finally:
        ray.shutdown()


def _work(recipe: Recipe, item: WorkItem) -> WorkItemRecord:
    """Convert one; the tokenizer is loaded once per process."""
    tokenizer = load_document_tokenizer(recipe.tokenizer_folder)
    return convert_work_item(recipe, item, tokenizer, lambda read_bytes, tokens: None)
