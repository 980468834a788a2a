"""Engines: functions that take the recipe and the work items, and return when each work item has its folder.

They schedule, retry what failed for reasons of the machine, and show progress. A work item's result depends on nothing
but the work item and the recipe, so it is the same with every engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from data_prep.work_item import Recipe, WorkItem, WorkItemRecord, check_bad_lines


def run_work_items(
    engine: str, recipe: Recipe, records: Mapping[WorkItem, WorkItemRecord | None], workers: int | None
) -> None:
    """Convert the work items that have no record yet.

    Raises a ValueError for what a work item cannot read, and once there are more bad lines than the recipe allows; work
    items that had begun are finished first.
    """
    check_bad_lines([line for record in records.values() if record for line in record.bad_lines], recipe.max_bad_lines)
    if all(records.values()):
        return
    if engine == 'ray':
        from data_prep.engines.ray import run
    else:
        from data_prep.engines.local import run
    run(recipe, records, workers)
