"""Commits the thresholds of threshold routing once per batch (:mod:`itt_composer.model.thresholds`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist

from itt_composer.model import RoutingState, routing_state, thinking_layers

# Enough for thresholds within a few per cent of the ratios, and a moment's work.
FIRST_SEQUENCES = 32


class ThresholdCommit(Callback):
    """Commits at the end of each batch, before checkpoints and evaluations.

    Every resolved training config of a model with routers has it. Without it the model commits by itself when it sees
    that its routers have changed, which they have not where the learning rate was zero.

    Args:
        first_thresholds: where the routers are new, set the thresholds before the first batch, from sequences across
            the training data; an evaluation before the training then routes the ratios' tokens.
    """

    def __init__(self, first_thresholds: bool = False):
        self.first_thresholds = first_thresholds
        self._calibrated: RoutingState | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        """Set the first thresholds of a model that has none; they do not count as a batch's."""
        layers, routing = thinking_layers(state.model), routing_state(state.model)
        if not self.first_thresholds or any(int(layer.threshold_updates) for layer in layers.values()):
            return
        was_training = state.model.training
        state.model.train()
        for batch in _sequences_across(state.train_dataloader, state.device_train_microbatch_size):
            with torch.no_grad(), get_precision_context(state.precision, state.precision_config):
                state.model(state.device.batch_to_device(batch))
        state.model.train(was_training)
        for layer in layers.values():
            layer.commit_thresholds()
            layer.threshold_updates.zero_()
        assert routing is not None
        # Of the layers' own, the model would warn that no batch has set them.
        routing.set_calibrated(list(layers), [layer.threshold_T.tolist() for layer in layers.values()])
        self._calibrated = routing

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Forget what an attempt at this batch has seen that ran out of memory; Composer sends the event again."""
        for layer in thinking_layers(state.model).values():
            layer.discard_pending()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Commit; local to each rank."""
        for layer in thinking_layers(state.model).values():
            layer.commit_thresholds()
        if self._calibrated is not None:
            self._calibrated.set_calibrated([], None)
            self._calibrated = None


def _sequences_across(loader: Any, batch_size: Any) -> Iterator[Any]:
    """Batches of sequences at even distances in the training data, of which each rank has others.

    They are taken from the dataset: to iterate over the loader would move the place in the data.
    """
    world, rank = dist.get_world_size(), dist.get_global_rank()
    # The length of a StreamingDataset is that of a rank's part of an epoch.
    total = getattr(loader.dataset, 'num_samples', None) or len(loader.dataset)
    count = max(1, min(FIRST_SEQUENCES, total) // world)
    size = batch_size if isinstance(batch_size, int) else 1
    places = [i * total // (count * world) for i in range(rank, count * world, world)]
    for start in range(0, count, size):
        yield loader.collate_fn([loader.dataset[i] for i in places[start : start + size]])
