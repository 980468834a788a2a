"""Engines: functions that take the recipe and the units, and return when each unit has its folder.

They schedule, repeat what failed for reasons of the machine, and show progress. A unit's result depends on nothing but
the unit and the recipe, so whichever engine runs it, it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from data_prep.work_item import Recipe, Unit, UnitRecord, check_bad_lines


def run_units(engine: str, recipe: Recipe, records: Mapping[Unit, UnitRecord | None], workers: int | None) -> None:
    """Convert the units that have no record yet.

    Raises a ValueError for what a unit cannot read, and once there are more bad lines than the recipe allows; units
    that had begun are finished first.
    """
    check_bad_lines([line for record in records.values() if record for line in record.bad_lines], recipe.max_bad_lines)
    if all(records.values()):
        return
    if engine == 'ray':
        from data_prep.engines.ray import run
    else:
        from data_prep.engines.local import run
    run(recipe, records, workers)
