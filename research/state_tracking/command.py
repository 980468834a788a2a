"""``python -m research state-tracking run``: train the missing runs, each in a process of its own with one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any

import typer

from itt_composer.atomic import check_writable
from research.state_tracking.study import LOSSES, Run, Study, add_rows, read_tables


def train_in_process(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Train the run in another process, and return its rows of each table."""
    arguments = (run.stage, run.variant, str(run.seed), str(run.learning_rate))
    result = subprocess.run(
        [sys.executable, '-m', 'research.state_tracking.train', *arguments],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCHINDUCTOR_COMPILE_THREADS': '1'},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def run_all(study: Study, out: Path, workers: int) -> None:
    """Train the runs that are missing in ``out``, and write the tables after each one.

    Raises:
        ValueError: the tables in ``out`` are of other settings.
        CalledProcessError: a run has failed.
    """
    tables = read_tables(out, study)
    running: dict[Future[Any], Run] = {}
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(running) < workers and (run := study.next_run(tables[LOSSES], list(running.values()))):
                running[pool.submit(train_in_process, run)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, rows = running.pop(future), future.result()
                add_rows(tables, rows, out)
                row = rows[LOSSES][0]
                print(
                    f'{run.stage} {run.variant} seed {run.seed} lr {run.learning_rate:g}: {row["loss"]:.4f}', flush=True
                )


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
        run_all(study, out, workers)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f'state-tracking run: {error}') from None
