"""The engine for a cluster: each unit is a Ray task. Ray schedules, places, and repeats what died with its process.

Every machine must see the source and OUT under the same paths, and have this package installed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

from data_prep.engines.progress import Progress
from data_prep.segments import DocumentTokenizer
from data_prep.unit import Recipe, Unit, UnitRecord, convert_unit

_POLL_SECONDS = 0.5
# How often a task is begun again after its process or machine died.
_RETRIES = 3


def run(recipe: Recipe, records: Mapping[Unit, UnitRecord | None], workers: int | None) -> None:
    """``run_units`` on the cluster that ``RAY_ADDRESS`` names, or on one of ``workers`` processes started here."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("ENGINE: ray is not installed; pip install 'ray', or take ENGINE=local") from error
    ray.init(
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # One process is one core: the tokenizer's own threads would only get in the other processes' way.
        runtime_env={'env_vars': {'TOKENIZERS_PARALLELISM': 'false'}},
    )
    try:
        with Progress(recipe, records) as progress:
            task = ray.remote(max_retries=_RETRIES)(_work)
            shared = ray.put(recipe)
            unit_of = {task.remote(shared, unit): unit for unit in progress.units}
            pending, read_bytes, tokens = list(unit_of), 0, 0
            while pending:
                done, pending = ray.wait(pending, timeout=_POLL_SECONDS)
                for reference in done:
                    record = ray.get(reference)
                    read_bytes += unit_of[reference].bytes
                    tokens += record.tokens
                    progress.add(record)
                progress.show(read_bytes, tokens)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f'Ray gave up on a task ({type(error).__name__}); the same command goes on from the last unit'
        ) from error
    finally:
        ray.shutdown()


def _work(recipe: Recipe, unit: Unit) -> UnitRecord:
    return convert_unit(recipe, unit, _tokenizer(recipe.tokenizer_folder), lambda read_bytes, tokens: None)


@functools.cache
def _tokenizer(folder: Path) -> DocumentTokenizer:
    return DocumentTokenizer(folder)
