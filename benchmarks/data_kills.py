"""Kills a conversion at random moments, resumes it, and compares the shards with those of an undisturbed run.

    python benchmarks/data_kills.py --source <folder> [--tokenizer <path>] [--kills 20] [--engine local|ray]

Each round converts in a process of its own, waits until a random number of work items is done and up to a tenth of a
second more, and sends SIGKILL to the driver or, every other round, to one of its workers. Then the same conversion is
run to its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import psutil
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Imported here once, so that the processes, which are forks, start at once and most kills hit the work.
from data_prep import engines, finish  # noqa: F401
from data_prep.conversion import convert


def content(out: Path) -> dict[str, str]:
    files = (path for path in out.rglob('*') if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def done(out: Path) -> int:
    """Work items that have their place."""
    return len(list(out.glob('.conversion/work_items/*/[0-9][0-9][0-9][0-9][0-9]/record.json')))


def quiet_convert(source: Path, out: Path, tokenizer: str | None, work_item_bytes: int, engine: str) -> None:
    with open(os.devnull, 'w') as nothing, contextlib.redirect_stderr(nothing):
        try:
            convert(source, out, tokenizer, 512, 20_000, workers=2, work_item_bytes=work_item_bytes, engine=engine)
        except RuntimeError:  # says that a worker was killed
            sys.exit(1)


def main(
    source: Annotated[Path, typer.Option(help='A folder as make data takes it; a few megabytes.')],
    tokenizer: Annotated[str | None, typer.Option(help='As make data takes it.')] = None,
    kills: Annotated[int, typer.Option(help='How many.')] = 20,
    engine: Annotated[str, typer.Option(help='local or ray')] = 'local',
    work_item_bytes: Annotated[int, typer.Option(help='Size of a work item.')] = 200_000,
    seed: Annotated[int, typer.Option(help='Of the moments.')] = 0,
) -> None:
    generator = random.Random(seed)
    counts = {'same': 0, 'killed': 0}
    with tempfile.TemporaryDirectory() as folder:

        def start(out: Path) -> BaseProcess:
            process = get_context('fork').Process(
                target=quiet_convert, args=(source, out, tokenizer, work_item_bytes, engine)
            )
            process.start()
            return process

        def run(out: Path) -> dict[str, str]:
            process = start(out)
            process.join()
            if process.exitcode:
                raise SystemExit('a run that nothing disturbed failed')
            return content(out)

        expected = run(Path(folder, 'whole'))
        # About the number of work items: those that gave training rows.
        items = len(list(Path(folder, 'whole').glob('train/*/[0-9]*')))
        out = Path(folder, 'out')
        while counts['killed'] < kills:
            process = start(out)
            driver = psutil.Process(process.pid)
            moment = generator.randint(0, items)
            while process.is_alive() and done(out) < moment:
                time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.1))
            workers = [] if counts['killed'] % 2 == 0 else driver.children(recursive=True)
            with contextlib.suppress(psutil.NoSuchProcess):
                (generator.choice(workers) if workers else driver).kill()
            process.join()
            if process.exitcode == 0:
                # It was done before its kill: no round.
                shutil.rmtree(out)
                continue
            counts['killed'] += 1
            at = done(out)
            same = run(out) == expected
            counts['same'] += same
            shutil.rmtree(out)
            who = 'a worker' if workers else 'the driver'
            typer.echo(f'{counts["killed"]:3} {who}, {at} work items done: {"the same" if same else "OTHER"} shards')
    typer.echo(f'{counts["same"]} of {kills} the same')
    raise SystemExit(0 if counts['same'] == kills else 1)


if __name__ == '__main__':
    typer.run(main)
