"""Time batches of the real trainer, with the fused optimizer and with Composer's own.

    python benchmarks/trainer_step.py [--batches 30] [--out results.csv]

``itt train itt_x4_162m`` on random tokens, each run in a process of its own; without a GPU ``itt_x4_tiny``. The speed
is that of ``speed_monitor``, the median over the windows of ten batches after the first twelve batches.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from report import check_results, show

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))

from common.shards import write_data

OPTIMIZERS = ('fused_decoupled_adamw', 'decoupled_adamw')


def train(name: str, overrides: list[str]) -> None:
    """Train; called in a process of its own."""
    from itt_composer.config.run_file import resolve
    from itt_composer.training.run import train

    train(resolve(name, overrides))


def speed(runs: Path, name: str) -> float:
    """Return the tokens per second that a run logged."""
    from itt_composer.training.tensorboard import RunLogs

    values = RunLogs(runs / 'tensorboard' / name).curve('throughput/tokens_per_sec')
    return statistics.median(value for batch, value in values.items() if batch > 12)


def itt_x4_run(folder: Path, batches: int) -> tuple[str, list[str]]:
    """Write random tokens into the folder; returns the training config and its overrides, without a run name."""
    gpu = torch.cuda.is_available()
    name, S, batch = ('itt_x4_162m', 4096, 32) if gpu else ('itt_x4_tiny', 64, 4)
    data = write_data(folder / 'data', {'cc': batch * batches}, {'cc': 1}, row_length=S)
    return name, [
        *(f'variables.data={data}', f'variables.runs={folder / "runs"}', 'variables.proportions=null'),
        *(f'max_seq_len={S}', f'global_train_batch_size={batch}', f'max_duration={batches}ba'),
        *('eval_loader=null', 'save_folder=null', 'autoresume=false', 'device_train_microbatch_size=4'),
        *('callbacks.causal_gap=null', 'callbacks.domain_mean=null', 'optimizer.lr=3e-4'),
        *([] if gpu else ['parts.machine=cpu']),
    ]


def main(
    batches: Annotated[int, typer.Option(help='Batches of each run.', min=14)] = 30,
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the benchmark and print its table."""
    check_results(out)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        name, keys = itt_x4_run(Path(folder), batches)
        for optimizer in OPTIMIZERS:
            own = [*keys, f'run_name={optimizer}', f'optimizer.name={optimizer}']
            process = get_context('spawn').Process(target=train, args=(name, own))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f'benchmark: the run with {optimizer} failed')
            tokens = speed(Path(folder, 'runs'), optimizer)
            rows.append({'optimizer': optimizer, 'tokens/s': f'{tokens:.0f}'})
    show(rows, f'Trainer, {name}', out)


if __name__ == '__main__':
    typer.run(main)
