"""Concurrent runs on this machine, each in its own process with one core or one GPU.

composer takes half a minute to import, so it is imported once and the processes are forks. The output of a run goes to
its own log. The next run starts when the one before has trained its first batch: streaming's data sets look for free
names in shared memory when they are built, and two that look at the same time find the same ones.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from itt_composer.training.run_error import NotFiniteError

START_SECONDS = 300
_POLL_SECONDS = 0.5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PR_SET_PDEATHSIG = 1


@dataclass
class _Running:
    name: str
    process: BaseProcess
    device: str | None
    log: Path
    log_start: int
    """Bytes in the log before this attempt."""
    bar: TaskID
    since: float
    batches: int = 0


def run_all(
    configs: Sequence[tuple[str, DictConfig]],
    finish: Callable[[str], str],
    logs: Path,
    concurrent: int,
    devices: Sequence[str] | None,
    console: Console,
) -> list[str]:
    """Train the runs, N of them concurrently; returns the names of those that failed.

    Args:
        configs: name and config of each run, in the order in which they start.
        finish: called with the name of a run that has ended, returns a line about its result; raises a ValueError where
            it has none.
        logs: folder of the logs.
        concurrent: N.
        devices: the GPUs, one for each run; None for cores.
        console: where progress is shown.
    """
    # Libraries look for a GPU while they are imported; asking CUDA itself would forbid its use in forks.
    os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')
    import llmfoundry.command_utils  # noqa: F401  (once, before the forks)
    import torch

    context: Any = multiprocessing.get_context('spawn' if torch.cuda.is_initialized() else 'fork')
    waiting, failed = list(configs), []
    running: list[_Running] = []
    free: list[str | None] = list(devices) if devices is not None else [None] * concurrent
    logs.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        whole = progress.add_task('runs', total=len(configs))
        try:
            while waiting or running:
                if waiting and free and not any(_is_starting(run) for run in running):
                    name, config = waiting.pop(0)
                    device, log = free.pop(), logs / f'{name}.log'
                    log_start = log.stat().st_size if log.is_file() else 0
                    process = context.Process(target=_train, args=(config, log, device, devices is None), name=name)
                    process.start()
                    bar = progress.add_task(name)
                    running.append(_Running(name, process, device, log, log_start, bar, time.monotonic()))
                for run in _ended(running, progress):
                    running.remove(run)
                    free.append(run.device)
                    minutes = (time.monotonic() - run.since) / 60
                    try:
                        if run.process.exitcode:
                            raise ValueError(f'exit code {run.process.exitcode}')
                        console.print(f'{run.name}: {finish(run.name)}, {minutes:.1f} min')
                    except ValueError as error:
                        failed.append(run.name)
                        console.print(f'[red]{run.name} failed[/red]: {error}; the end of {run.log}:')
                        console.print(_tail(run.log, 15), markup=False)
                    progress.advance(whole)
                time.sleep(_POLL_SECONDS)
        finally:
            for run in running:
                run.process.kill()
                run.process.join()
    return failed


def _ended(running: list[_Running], progress: Progress) -> Iterator[_Running]:
    for run in list(running):
        alive = run.process.is_alive()
        if done := batches_done(run.log, run.log_start):
            run.batches, total = done
            progress.update(run.bar, completed=run.batches, total=total)
        if not alive:
            run.process.join()
            progress.remove_task(run.bar)
            yield run


def _is_starting(run: _Running) -> bool:
    return not run.batches and run.process.is_alive() and time.monotonic() - run.since < START_SECONDS


def batches_done(log: Path, start: int) -> tuple[int, int] | None:
    """Return batches trained and all batches, from a run's log after byte ``start``; None before the first."""
    done = re.findall(r'\[batch=(\d+)/(\d+)\]', _tail(log, 40, start))
    return (int(done[-1][0]), int(done[-1][1])) if done else None


def _tail(path: Path, lines: int, start: int = 0) -> str:
    if not path.is_file():
        return ''
    with open(path, 'rb') as file:
        file.seek(max(start, path.stat().st_size - 16384))
        return '\n'.join(file.read().decode(errors='replace').splitlines()[-lines:])


def _train(config: DictConfig, log: Path, device: str | None, one_core: bool) -> None:
    """Train one run in its own process."""
    _end_with_the_study()
    # A fork runs no exit functions; streaming frees its shared memory in one. Those of the study are not the run's.
    atexit._clear()
    with open(log, 'a') as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    sys.stdout = sys.stderr = open(1, 'w', buffering=1, closefd=False)  # noqa: SIM115 (as long as the process)
    try:
        import torch

        from itt_composer.training.run import train

        if one_core:
            torch.set_num_threads(1)
            _keep_buffers()
        elif device is not None:
            os.environ['CUDA_VISIBLE_DEVICES'] = device
        train(config)
    except NotFiniteError as error:
        print(error)  # The run's result: an infinite loss.
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def _end_with_the_study() -> None:
    """End a run when the study is killed, so that starting the study again does not train it twice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the study, which ends its runs.
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep_buffers() -> None:
    """Keep buffers as large as the logits: glibc returns them to the system, which costs a third of a CPU's step."""
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        if hasattr(libc, 'mallopt'):
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
