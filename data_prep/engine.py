"""Runs units on this machine: a pool of processes, a progress bar, and no half-alive workers.

An engine is a function that takes the recipe and the units still to do, and returns when each has its folder.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from data_prep.tokenizer import load_saved
from data_prep.unit import Recipe, Unit, UnitRecord, check_bad_lines, convert_unit

_POLL_SECONDS = 0.5

# Of a worker process, set once by _start_worker.
_recipe: Recipe
_tokenizer: Tokenizer
_counters: tuple[Any, Any]


def run_local(recipe: Recipe, records: Mapping[Unit, UnitRecord | None], workers: int) -> None:
    """Convert the units that have no record yet, with ``workers`` processes.

    Raises a ValueError for what a unit cannot read, and once there are more bad lines than the recipe allows; units
    that had begun are finished first.
    """
    bad_lines = [line for record in records.values() if record for line in record.bad_lines]
    check_bad_lines(bad_lines, recipe.max_bad_lines)
    units = sorted((unit for unit, record in records.items() if not record), key=lambda unit: unit.bytes, reverse=True)
    if not units:
        return
    # A fork has the imports already; where it is not safe (macOS), the default start method imports them again.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    counters = context.Value('q', 0), context.Value('q', 0)
    arguments = min(workers, len(units)), context, _start_worker, (recipe, *counters)
    with _one_thread_tokenizers(), ProcessPoolExecutor(*arguments) as pool:
        pending = {pool.submit(_work, unit) for unit in units}
        try:
            with _progress_bar() as progress:
                done_bytes = sum(unit.bytes for unit, record in records.items() if record)
                total = done_bytes + sum(unit.bytes for unit in units)
                task = progress.add_task('converting', total=total, completed=done_bytes, rate='')
                while pending:
                    done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                    elapsed = progress.tasks[task].elapsed
                    rate = f'{counters[1].value / elapsed:,.0f} tokens/s' if elapsed else ''
                    progress.update(task, completed=done_bytes + counters[0].value, rate=rate)
                    for future in done:
                        bad_lines += future.result().bad_lines
                        check_bad_lines(bad_lines, recipe.max_bad_lines)
        except BrokenProcessPool as error:
            raise RuntimeError('a worker process was killed; the same command goes on from the last unit') from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread_tokenizers() -> Iterator[None]:
    """One process is one core: the tokenizer's own threads would only get in the other processes' way."""
    name = 'TOKENIZERS_PARALLELISM'
    before = os.environ.get(name)
    os.environ[name] = 'false'
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _progress_bar() -> Progress:
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        TextColumn('{task.percentage:3.0f} %  {task.fields[rate]}'),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _start_worker(recipe: Recipe, read_bytes: Any, tokens: Any) -> None:
    global _recipe, _tokenizer, _counters
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C the parent alone has something to say
    _recipe, _tokenizer, _counters = recipe, load_saved(recipe.tokenizer_folder), (read_bytes, tokens)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _work(unit: Unit) -> UnitRecord:
    return convert_unit(_recipe, unit, _tokenizer, _report)


def _report(read_bytes: int, tokens: int) -> None:
    for counter, increment in zip(_counters, (read_bytes, tokens), strict=True):
        with counter.get_lock():
            counter.value += increment
