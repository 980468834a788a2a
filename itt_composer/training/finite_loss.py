"""A training whose loss or weights are no longer finite ends, before a checkpoint of it replaces a good one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from composer.callbacks.checkpoint_saver import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from llmfoundry.callbacks import HuggingFaceCheckpointer
from torch.distributed.tensor import DTensor

from itt_composer.training.run_error import NotFiniteError


class FiniteLoss(Callback):
    """Ends the training at the first loss that is not finite, or where such weights are about to be saved or evaluated.

    Composer copies the loss of each batch to the host anyway. The weights are read only where it matters: a gradient
    that is not finite spoils them one batch before the loss shows it.

    Raises:
        NotFiniteError: from the events, on every rank.
    """

    def fit_start(self, state: State, logger: Logger) -> None:
        """Put the check of the weights before each save."""
        for callback in state.callbacks:
            if isinstance(callback, CheckpointSaver):
                callback.save_interval = self._checked(callback.save_interval)
            elif isinstance(callback, HuggingFaceCheckpointer):
                callback.check_interval = self._checked(callback.check_interval)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check the loss."""
        loss = state.total_loss_dict.get('loss/train/total', 0.0)
        if not math.isfinite(loss):
            _stop(state, f'the loss of batch {state.timestamp.batch.value} is not finite, got {loss}')

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Check the weights."""
        check_weights(state)

    def _checked(self, due: Callable[[State, Event], bool]) -> Callable[[State, Event], bool]:
        def checked(state: State, event: Event) -> bool:
            if not due(state, event):
                return False
            check_weights(state)
            return True

        return checked


def check_weights(state: State) -> None:
    """Raise NotFiniteError on every rank where a weight of the model, or a shard of it, is not finite."""
    tensors = [*state.model.parameters(), *(buffer for buffer in state.model.buffers() if buffer.is_floating_point())]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors]
    finite = torch.stack([tensor.isfinite().all() for tensor in local]).all().to(torch.uint8)
    dist.all_reduce(finite, reduce_operation='MIN')
    if not finite.item():
        _stop(state, f'the weights after batch {state.timestamp.batch.value} are not finite')


def _stop(state: State, problem: str) -> None:
    saver = next((callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)), None)
    last = ''
    if saver is not None and saver.saved_checkpoints:
        saved = Path(saver.saved_checkpoints[-1])
        # Of a sharded checkpoint, which is a folder, Composer lists a file.
        last = f'; {(saved if saved.suffix == ".pt" else saved.parent).name} is the last checkpoint before it'
    raise NotFiniteError(
        f'{state.run_name}: {problem}{last}; lower optimizer.lr, with resume_with_changes=true to continue from there, '
        'or with run_name= to train anew'
    )
