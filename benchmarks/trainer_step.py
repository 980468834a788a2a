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
GPU = torch.cuda.is_available()
NAME, S, BATCH = ('itt_x4_162m', 4096, 32) if GPU else ('itt_x4_tiny', 64, 4)


def train(overrides: list[str]) -> None:
    """Train; called in a process of its own."""
    from itt_composer.config.run_file import resolve
    from itt_composer.training.run import train

    train(resolve(NAME, overrides))


def speed(runs: Path, name: str) -> float:
    """Return the tokens per second that a run logged."""
    from itt_composer.analysis.tensorboard import RunLogs

    values = RunLogs(runs / 'tensorboard' / name).curve('throughput/tokens_per_sec')
    return statistics.median(value for batch, value in values.items() if batch > 12)


def run_overrides(folder: Path, batches: int) -> list[str]:
    """Write random tokens into the folder; returns the overrides of a training on them, without a run name."""
    data = write_data(folder / 'data', {'cc': BATCH * batches}, {'cc': 1}, row_length=S)
    return [
        *(f'variables.data={data}', f'variables.runs={folder / "runs"}', 'variables.proportions=null'),
        *(f'max_seq_len={S}', f'global_train_batch_size={BATCH}', f'max_duration={batches}ba'),
        *('eval_loader=null', 'save_folder=null', 'autoresume=false', 'device_train_microbatch_size=4'),
        *('callbacks.causal_gap=null', 'callbacks.domain_mean=null', 'optimizer.lr=3e-4'),
        *([] if GPU else ['parts.machine=cpu']),
    ]


def main(
    batches: Annotated[int, typer.Option(help='Batches of each run.', min=14)] = 30,
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Run the benchmark and print its table."""
    check_results(out)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        overrides = run_overrides(Path(folder), batches)
        for optimizer in OPTIMIZERS:
            own = [*overrides, f'run_name={optimizer}', f'optimizer.name={optimizer}']
            process = get_context('spawn').Process(target=train, args=(own,))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f'benchmark: the run with {optimizer} failed')
            tokens = speed(Path(folder, 'runs'), optimizer)
            ms = f'{1000 * BATCH * S / tokens:.1f}'
            rows.append({'optimizer': optimizer, 'tokens/s': f'{tokens:.0f}', 'ms per batch': ms})
    show(rows, f'Trainer, {NAME}, S {S}, batch {BATCH}', out)


if __name__ == '__main__':
    typer.run(main)
