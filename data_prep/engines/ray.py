"""The engine for a Ray cluster: each unit is a task. Ray schedules, places, and repeats what died with its process.

Every machine must see the source and OUT under the same paths, and have this package installed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from data_prep.engines.cluster import ENVIRONMENT, POLL_SECONDS, RETRIES, check_workers, gave_up, not_installed, work
from data_prep.engines.progress import Progress
from data_prep.work_item import Recipe, Unit, UnitRecord


def run(recipe: Recipe, records: Mapping[Unit, UnitRecord | None], workers: int | None) -> None:
    """``run_units`` on the cluster that ``RAY_ADDRESS`` names, or on one of ``workers`` processes started here."""
    try:
        import ray
    except ImportError as error:
        raise not_installed('ray', 'ray') from error
    check_workers('RAY_ADDRESS', workers)
    try:
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={'env_vars': ENVIRONMENT},
        )
    except Exception as error:  # Ray's own for a slow start has no class of its own
        raise RuntimeError(
            f'ENGINE: Ray did not start, or was not reached ({error}); a busy machine can be too slow for it: '
            'run the same command again, or take ENGINE=local'
        ) from error
    try:
        with Progress(recipe, records) as progress:
            task = ray.remote(max_retries=RETRIES)(work)
            shared = ray.put(recipe)
            unit_of = {task.remote(shared, unit): unit for unit in progress.units}
            pending, read_bytes, tokens = list(unit_of), 0, 0
            while pending:
                done, pending = ray.wait(pending, timeout=POLL_SECONDS)
                for reference in done:
                    record = ray.get(reference)
                    read_bytes += unit_of[reference].bytes
                    tokens += record.tokens
                    progress.add(record)
                progress.show(read_bytes, tokens)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise gave_up('Ray', error) from error
    finally:
        ray.shutdown()
