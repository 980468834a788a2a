"""Kills a conversion at random moments, resumes it, and compares the shards with those of an undisturbed run.

    python benchmarks/data_kills.py --source <folder> [--tokenizer <path>] [--kills 20] [--engine local|ray]

Each round starts `python -m data_prep` in a process group of its own, waits for a random time of an undisturbed run's,
and sends SIGKILL to the driver or to one of its workers in turn; then the same command is run to its end.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

REPOSITORY = Path(__file__).resolve().parents[1]


def content(out: Path) -> dict[str, str]:
    files = (path for path in out.rglob('*') if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def descendants(pid: int) -> list[int]:
    """Processes below a process, from /proc."""
    parents = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
        except OSError:
            continue  # gone meanwhile
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        below = [child for child, above in parents.items() if above == parent]
        found += below
        todo += below
    return sorted(found)


def main(
    source: Annotated[Path, typer.Option(help='A folder as make data takes it; some megabytes.')],
    tokenizer: Annotated[str | None, typer.Option(help='As make data takes it.')] = None,
    kills: Annotated[int, typer.Option(help='How many.')] = 20,
    engine: Annotated[str, typer.Option(help='local or ray')] = 'local',
    seed: Annotated[int, typer.Option(help='Of the moments.')] = 0,
) -> None:
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:

        def command(out: Path) -> list[str]:
            options = ['--out', str(out), '--source', str(source), '--engine', engine, '--workers', '2']
            options += ['--seq-len', '512', '--validation-tokens', '20000']
            return [sys.executable, '-m', 'data_prep', *options, *(['--tokenizer', tokenizer] if tokenizer else [])]

        def start(out: Path) -> subprocess.Popen:
            return subprocess.Popen(command(out), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        whole = Path(folder, 'whole')
        begun = time.monotonic()
        if start(whole).wait():
            raise SystemExit('the undisturbed run failed: ' + ' '.join(command(whole)))
        seconds = time.monotonic() - begun
        expected = content(whole)
        same = killed = 0
        for i in range(kills):
            out = Path(folder, 'out')
            # A run of an earlier round may have ended before its kill: such a round counts too, as what it is.
            process = start(out)
            time.sleep(generator.uniform(0.05, 1.0) * seconds)
            workers = descendants(process.pid)
            victim = process.pid if i % 2 == 0 or not workers else generator.choice(workers)
            running = process.poll() is None
            if running:
                os.kill(victim, signal.SIGKILL)
                killed += 1
            process.wait()
            if start(out).wait():
                raise SystemExit(f'round {i}: the resumed run failed')
            equal = content(out) == expected
            same += equal
            who = 'driver' if victim == process.pid else 'worker'
            typer.echo(f'{i + 1:3} {who if running else "too late"} {"the same" if equal else "DIFFERENT"}')
            shutil.rmtree(out)
    typer.echo(f'{same} of {kills} the same; {killed} were killed before their end; {seconds:.0f} s undisturbed')
    raise SystemExit(0 if same == kills else 1)


if __name__ == '__main__':
    typer.run(main)
