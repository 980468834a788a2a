"""``python -m research state-tracking run``: train the missing runs, each in a process with one thread."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from itt_composer.atomic import check_writable
from itt_composer.training.run_lock import only_process
from research.state_tracking.study import LOSSES, Run, Study, add_rows, read_tables


def rows_of(study: Study, run: Run) -> dict[str, list[dict[str, Any]]]:
    """Train the run with one thread, and return its rows of each table."""
    import torch

    torch.set_num_threads(1)
    return import_module('research.state_tracking.train').run_rows(study, run)


def run_all(study: Study, out: Path, workers: int) -> None:
    """Train the runs that are missing in ``out``, and write the tables after each one.

    After an error no run starts, and those that are running end first.

    Raises:
        ValueError: the tables in ``out`` are of other settings.
        BrokenProcessPool: a process was killed.
    """
    tables = read_tables(out, study)
    running: dict[Future[Any], Run] = {}

    def finish(future: Future[Any]) -> None:
        run, rows = running.pop(future), future.result()
        add_rows(tables, rows, out)
        row = rows[LOSSES][0]
        print(f'{run.stage} {run.variant} seed {run.seed} lr {run.learning_rate:g}: {row["loss"]:.4f}', flush=True)

    import_module('research.state_tracking.train')  # takes seconds; once, before the forks
    with ProcessPoolExecutor(workers, get_context('fork')) as pool:
        try:
            while True:
                while len(running) < workers and (run := study.next_run(tables[LOSSES], list(running.values()))):
                    running[pool.submit(rows_of, study, run)] = run
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finish(future)
        except BaseException:  # Ctrl-C too.
            for future in wait(running).done:
                if future.exception() is None:
                    finish(future)
            raise


def main(
    variants: Annotated[list[str] | None, typer.Option(help='Only these; may be repeated.')] = None,
    seeds: Annotated[list[int] | None, typer.Option(help='Instead of those of the plan; may be repeated.')] = None,
    workers: Annotated[int, typer.Option(min=1, help='Concurrent runs.')] = 2,
    out: Annotated[Path, typer.Option(help='Folder of the tables.')] = Path('runs/state_tracking'),
) -> None:
    """Train the runs that the tables do not have yet; after a stop the same command continues."""
    try:
        study = Study(variants or (), seeds or ())
        check_writable(out / LOSSES)
        with only_process(out, 'set another folder (--out)'):
            run_all(study, out, workers)
    except (ValueError, OSError, BrokenProcessPool) as error:
        raise SystemExit(f'state-tracking run: {error}') from None
