"""Averages the routing thresholds over the ranks, so that they are those of the whole batch and the same everywhere."""

from __future__ import annotations

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from itt_composer.model import thinking_layers


class ThresholdAverage(Callback):
    """Averages ``threshold_T`` of every thinking layer over the ranks at the end of each batch.

    A threshold is a running mean over the rank's own sequences. The running mean is linear in them, so the mean over
    the ranks after the batch is the running mean over all sequences. Checkpoints and evaluations come after the end of
    a batch and find the average. One collective of a few numbers serves the whole model.
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        """Average; nothing to do on one rank."""
        layers = list(thinking_layers(state.model).values())
        if not layers or dist.get_world_size() == 1:
            return
        mean_LT = torch.stack([layer.threshold_T for layer in layers]).float()
        dist.all_reduce(mean_LT)
        mean_LT /= dist.get_world_size()
        for layer, mean_T in zip(layers, mean_LT, strict=True):
            layer.threshold_T.copy_(mean_T)
