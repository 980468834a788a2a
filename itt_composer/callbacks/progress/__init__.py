"""Print progress, one line per interval: loss, time per batch, time left."""

from __future__ import annotations

import time

from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from itt_composer.training.trainer_time import Interval, progress, training_length


class Progress(Callback):
    """Print batch, loss, seconds per batch and the time left; and the scores of each evaluation set.

    The time left is until the command ends. It assumes that evaluations and checkpoints take the share of the time
    that they have taken since this start.

    Args:
        interval: time between two lines, ``'10ba'`` for example.
    """

    def __init__(self, interval: str = '10ba'):
        self.interval = Interval('interval', interval)
        self._start = (0.0, 0.0)
        self._last = (0.0, 0)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say what begins."""
        self._start = time.monotonic(), progress(state, TimeUnit.DURATION)
        self._last = self._start[0], state.timestamp.batch.value
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        _print(f'{state.run_name}: {parameters:,} parameters on {state.device.name}; {_batch(state)} training starts')

    def batch_end(self, state: State, logger: Logger) -> None:
        """Print a line where one is due, and after the last batch."""
        if not self.interval.due(state) and progress(state, TimeUnit.DURATION) < 1:
            return
        now, done = time.monotonic(), progress(state, TimeUnit.DURATION)
        start, done_before = self._start
        left = (now - start) / max(done - done_before, 1e-9) * (1 - done)
        batches = max(state.timestamp.batch.value - self._last[1], 1)
        loss = float(state.total_loss_dict['loss/train/total'])
        seconds = (now - self._last[0]) / batches
        _print(f'{_batch(state)} loss {loss:.4f}, {seconds:.3g} s per batch, {_duration(left)} left')
        self._last = now, state.timestamp.batch.value

    def eval_start(self, state: State, logger: Logger) -> None:
        """Say which set is evaluated."""
        _print(f'{_batch(state)} evaluating {state.dataloader_label}')

    def eval_end(self, state: State, logger: Logger) -> None:
        """Print the scores, which Composer has computed."""
        metrics = state.eval_metrics.get(state.dataloader_label or '', {})
        scores = ', '.join(f'{name} {float(metric.compute()):.4g}' for name, metric in metrics.items())
        _print(f'{_batch(state)} {state.dataloader_label}: {scores}')


def _print(line: str) -> None:
    if dist.get_global_rank() == 0:
        print(line, flush=True)


def _batch(state: State) -> str:
    total = training_length(state, TimeUnit.BATCH) if state.max_duration is not None else None
    return f'[batch={state.timestamp.batch.value}{f"/{round(total)}" if total else ""}]'


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f'{seconds:.0f} s'
    return f'{minutes:.0f} min' if hours < 2 else f'{hours:.1f} h'
