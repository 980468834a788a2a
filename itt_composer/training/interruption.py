"""A run that is asked to end (SIGTERM, Ctrl-C) writes a checkpoint first, and its checkpoints stay bounded."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from composer.callbacks.checkpoint_saver import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from itt_composer.training.checkpoints import batch_of, checkpoints
from itt_composer.training.finite_loss import check_weights
from itt_composer.training.run_error import RunError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption(Callback):
    """Saves a checkpoint after the batch in which a signal came, and ends the run with 128 plus the signal's number.

    A second Ctrl-C ends it without waiting. A signal during an evaluation waits for the evaluation's end.

    Raises:
        RunError: from ``batch_checkpoint``, on every rank; NotFiniteError, and no checkpoint, where a weight is not
            finite.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Listen to the signals, and have the saver count the checkpoints of earlier starts among those to keep."""
        for saver in _savers(state):
            trained = state.timestamp.batch.value
            earlier = [path for path in checkpoints(Path(saver.folder)) if batch_of(path) <= trained]
            # Of a sharded one Composer removes the folder of the file named.
            saver.saved_checkpoints[:0] = [str(path / 'shard' if path.is_dir() else path) for path in earlier]
        if threading.current_thread() is threading.main_thread():
            listened = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in listened}

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Where a rank has received a signal, save and end, all ranks together."""
        received = torch.tensor(self._received)
        if dist.get_world_size() > 1:
            received = state.device.tensor_to_device(received)
            dist.all_reduce(received, reduce_operation='MAX')
        number = int(received.item())
        if not number:
            return
        check_weights(state)
        savers = _savers(state)
        for saver in savers:
            if saver.last_checkpoint_batch != state.timestamp.batch:
                saver._save_checkpoint(state, logger)
        saved = 'the same command continues' if savers else 'there is no save_folder, so that nothing is saved'
        stopped = f'stopped by {signal.Signals(number).name} after batch {state.timestamp.batch.value}'
        raise RunError(f'{state.run_name}: {stopped}; {saved}', exit_code=128 + number)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or number


def _savers(state: State) -> list[CheckpointSaver]:
    return [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]
