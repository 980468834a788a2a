"""Kills a training at random moments, resumes it, and compares its end with that of an undisturbed run, bit for bit.

    python benchmarks/train_kills.py [--kills 20] [--batches 8]

Rounds take turns: SIGKILL at a random moment, SIGKILL within the write of a checkpoint, and a second start at a random
moment (which must be refused) before SIGKILL. Weights, optimizer and the names of the files left must be the same.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))

# Imported here once, so that the processes, which are forks, start at once and most kills hit the training.
from common.shards import write_data
from common.tiny_runs import tiny_config
from composer.utils import checkpoint as composer_checkpoint

from itt_composer.training.run import train
from itt_composer.training.run_error import RunError

REFUSED = 3


def kill_within_write(number: int, share: float) -> None:
    """Have this process die when it has written a share of its checkpoint of that number."""
    left = [number]

    def write(state: dict[str, Any], filename: str) -> None:
        content = io.BytesIO()
        torch.save(state, content)
        whole = content.getvalue()
        left[0] -= 1
        with open(filename, 'wb') as file:
            file.write(whole if left[0] else whole[: int(share * len(whole))])
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    composer_checkpoint._write_checkpoint_file = write


def start(config: Any, before: Callable[[], None] | None = None) -> BaseProcess:
    def run() -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        torch.set_num_threads(1)
        try:
            if before:
                before()
            train(config.copy())
        except RunError:
            os._exit(REFUSED)
        os._exit(0)

    process = get_context('fork').Process(target=run)
    process.start()
    return process


def outcome(runs: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """All tensors of the last checkpoint, and the files of the run."""
    state = torch.load(runs / 'r' / 'checkpoints' / 'latest-rank0.pt', weights_only=False)['state']
    tensors: dict[str, torch.Tensor] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, f'{name}.{key}')

    collect({key: state[key] for key in ('model', 'optimizers')}, 'state')
    return tensors, sorted(str(path.relative_to(runs)) for path in (runs / 'r').rglob('*'))


def main(
    kills: Annotated[int, typer.Option(help='How many.')] = 20,
    batches: Annotated[int, typer.Option(help='Length of the training; there is a checkpoint every other batch.')] = 8,
    seed: Annotated[int, typer.Option(help='Of the moments.')] = 0,
) -> None:
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder, 'data'), {'arxiv': 64, 'wiki': 32}, {'arxiv': 4, 'wiki': 4})

        def config(runs: Path) -> Any:
            return tiny_config(data, runs, 'run_name=r', f'max_duration={batches}ba', 'model.hidden_size=128')

        def finish(runs: Path) -> float:
            began = time.monotonic()
            for _ in range(5):
                process = start(config(runs))
                process.join()
                if not process.exitcode:
                    return time.monotonic() - began
                # Trainings that start at the same moment on one machine may take each other's shared memory.
                time.sleep(1)
            raise SystemExit(f'a run that nothing disturbed ended with {process.exitcode}')

        seconds = finish(Path(folder, 'undisturbed'))
        expected, files = outcome(Path(folder, 'undisturbed'))
        done = same = refused = second_starts = left_over = 0
        while done < kills:
            runs = Path(folder, f'runs{done}')
            kind = ('a moment', 'a write', 'a second start')[done % 3]
            number, share = moments.randint(1, batches // 2), moments.random()
            process = start(
                config(runs), (lambda n=number, s=share: kill_within_write(n, s)) if done % 3 == 1 else None
            )
            if kind == 'a second start':
                time.sleep(moments.uniform(0.1, 0.7 * seconds))
                second = start(config(runs))
                second.join()
            elif kind == 'a moment':
                time.sleep(moments.uniform(0, seconds))
            if kind != 'a write':
                process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:
                # It was done before its kill: no round.
                shutil.rmtree(runs)
                continue
            if kind == 'a second start':
                second_starts += 1
                refused += second.exitcode == REFUSED
            at = sorted(path.name for path in (runs / 'r' / 'checkpoints').glob('ep*')) if runs.exists() else []
            finish(runs)
            tensors, names = outcome(runs)
            equal = tensors.keys() == expected.keys() and all(torch.equal(tensors[n], expected[n]) for n in expected)
            done, same, left_over = done + 1, same + equal, left_over + len(set(names) - set(files))
            typer.echo(f'{done:3} {kind}, at {", ".join(at) or "the start"}: {"the same" if equal else "OTHER"}')
            shutil.rmtree(runs)
    typer.echo(
        f'{same} of {kills} the same, {left_over} files left over, {refused} of {second_starts} second starts refused'
    )
    raise SystemExit(0 if (same, left_over, refused) == (kills, 0, second_starts) else 1)


if __name__ == '__main__':
    typer.run(main)
