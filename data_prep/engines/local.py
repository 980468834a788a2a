"""The engine for one machine: a pool of processes, and no half-alive workers."""

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

from data_prep.cpus import usable_cpus
from data_prep.engines.progress import Progress
from data_prep.tokens.document_tokenizer import DocumentTokenizer, load_document_tokenizer
from data_prep.work_item import Recipe, WorkItem, WorkItemRecord, convert_work_item

_POLL_SECONDS = 0.5

# Of a worker process, set once by _start_worker.
_recipe: Recipe
_tokenizer: DocumentTokenizer
_counters: tuple[Any, Any]


def run(recipe: Recipe, records: Mapping[WorkItem, WorkItemRecord | None], workers: int | None) -> None:
    """``run_work_items`` with ``workers`` processes; None: one per CPU that this process may use."""
    with Progress(recipe, records) as progress:
        # A fork has the imports already; where it is not safe (macOS), the default start method imports them again.
        context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
        counters = context.Value('q', 0), context.Value('q', 0)
        processes = min(workers or usable_cpus(), len(progress.items))
        load_document_tokenizer(recipe.tokenizer_folder)  # for all the forks
        arguments = processes, context, _start_worker, (recipe, *counters)
        with _one_thread_tokenizers(), ProcessPoolExecutor(*arguments) as pool:
            pending = {pool.submit(_work, item) for item in progress.items}
            try:
                while pending:
                    done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                    progress.show(counters[0].value, counters[1].value)
                    for future in done:
                        progress.add(future.result())
            except BrokenProcessPool as error:
                raise RuntimeError(
                    'a worker process was killed, perhaps because memory ran out; run the same command again, or with '
                    'fewer --workers'
                ) from error
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


def _start_worker(recipe: Recipe, read_bytes: Any, tokens: Any) -> None:
    global _recipe, _tokenizer, _counters
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C the parent alone has something to say
    _recipe, _tokenizer, _counters = recipe, load_document_tokenizer(recipe.tokenizer_folder), (read_bytes, tokens)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _work(item: WorkItem) -> WorkItemRecord:
    return convert_work_item(_recipe, item, _tokenizer, _report)


def _report(read_bytes: int, tokens: int) -> None:
    for counter, increment in zip(_counters, (read_bytes, tokens), strict=True):
        with counter.get_lock():
            counter.value += increment
