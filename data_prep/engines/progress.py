"""What an engine keeps while work items are worked on: which are left, a progress bar, and the count of bad lines."""

from __future__ import annotations

from collections.abc import Mapping

import rich.progress
from rich.console import Console

from data_prep.work_item import Recipe, WorkItem, WorkItemRecord, check_bad_lines


class Progress:
    """A progress bar over the work items' bytes; a context that shows it."""

    def __init__(self, recipe: Recipe, records: Mapping[WorkItem, WorkItemRecord | None]):
        self.items = sorted(
            (item for item, record in records.items() if not record), key=lambda item: item.bytes, reverse=True
        )
        """The work items to do, the largest first."""
        self._limit = recipe.max_bad_lines
        self._bad_lines = [line for record in records.values() if record for line in record.bad_lines]
        self._done_before = sum(item.bytes for item, record in records.items() if record)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn('{task.description}'),
            rich.progress.BarColumn(),
            rich.progress.TextColumn('{task.percentage:3.0f} %  {task.fields[rate]}'),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn('left'),
            rich.progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        total = sum(item.bytes for item in records)
        self._task = self._bar.add_task('converting', total=total, completed=self._done_before, rate='')

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, read_bytes: int, tokens: int) -> None:
        """Bytes read and tokens made since the start."""
        elapsed = self._bar.tasks[self._task].elapsed
        rate = f'{tokens / elapsed:,.0f} tokens/s' if elapsed else ''
        self._bar.update(self._task, completed=self._done_before + read_bytes, rate=rate)

    def add(self, record: WorkItemRecord) -> None:
        """A work item is done; raises a ValueError once there are more bad lines than the recipe allows."""
        self._bad_lines += record.bad_lines
        check_bad_lines(self._bad_lines, self._limit)
