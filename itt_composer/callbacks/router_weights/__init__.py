"""Log gate values of the routers, and the tokens they route (Figure 6, right; Section 4.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from itt_composer.analysis.router_weights import (
    LayerStep,
    RoutedTokens,
    histogram,
    join,
    plot_router_weights,
    routed_layers,
)
from itt_composer.callbacks.pictures import log_histogram, log_picture
from itt_composer.model import RoutingState, routing_state
from itt_composer.training.trainer_time import Interval, PeriodicCallback, is_last_batch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def summarise(tokens: RoutedTokens) -> dict[str, float]:
    """Return mean and quantiles of the gate values, the fraction of tokens routed, and the threshold (a score)."""
    quantiles = np.quantile(tokens.gate_N, QUANTILES)
    return {
        'gate_mean': float(tokens.gate_N.mean()),
        **{f'gate_q{100 * q:02.0f}': float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        'fraction_routed': float(tokens.routed_N.mean()),
        'threshold': tokens.threshold,
    }


class RouterWeights(PeriodicCallback):
    """Record the routers during one training batch per interval, and log what they did.

    All microbatches of the batch are joined. Scalars are means over the ranks (each has the same number of tokens);
    histograms and the figure show the tokens of the first rank. Between recorded batches the model records nothing.

    Args:
        interval: time between two recordings, a time string; the first and the last batch are recorded too.
        picture_interval: time between two recordings with figure and histograms; they come with the first recording
            (also of a resumed run) and the last.

    Raises:
        ValueError: an interval is no time string; at INIT, the model has no routers.
    """

    def __init__(self, interval: str = '100ba', picture_interval: str = '1000ba'):
        self.interval = Interval('router_weights.interval', interval)
        self.picture_interval = Interval('router_weights.picture_interval', picture_interval)
        self._recording = self._drawing = False
        self._gathered: dict[LayerStep, list[Any]] = {}

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model without routers."""
        if not routed_layers(state.model):
            raise ValueError(
                'router_weights: the model has no routers; set thinking: itt and token_routing: true, or remove the '
                'callback'
            )

    def batch_start(self, state: State, logger: Logger) -> None:
        """Decide whether this batch is recorded."""
        last = is_last_batch(state)
        self._recording = self.interval.due(state) or last
        self._drawing = self._recording and (self.picture_interval.due(state) or last)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Discard earlier records; Composer sends this event again when a batch ran out of memory."""
        self._gathered = {}

    def before_forward(self, state: State, logger: Logger) -> None:
        """Start recording for a microbatch's forward pass."""
        if self._recording:
            _routing(state).records = []

    def after_forward(self, state: State, logger: Logger) -> None:
        """Stop recording, so that the second forward pass of activation checkpointing is not recorded."""
        if not self._recording:
            return
        records, _routing(state).records = _routing(state).records, None
        assert records is not None, 'started before the forward pass'
        for record in records:
            self._gathered.setdefault((record.layer, record.step), []).append(record)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Log the batch."""
        if not self._recording:
            return
        self._recording = False
        tokens = {layer_step: join(records) for layer_step, records in self._gathered.items()}
        self._gathered = {}

        metrics = {
            f'router/layer{layer}/step{step}/{name}': value
            for (layer, step), routed in tokens.items()
            for name, value in summarise(routed).items()
        }
        mean = state.device.tensor_to_device(torch.tensor(list(metrics.values())))
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        logger.log_metrics(dict(zip(metrics, mean.tolist(), strict=True)))

        if self._drawing:
            for (layer, step), routed in tokens.items():
                name = f'router/layer{layer}/step{step}/gate'
                log_histogram(logger, name, routed.gate_N, state.timestamp.batch.value)
            log_picture(logger, 'router/gate_values', lambda: plot_router_weights(histogram(tokens)))

    def close(self, state: State, logger: Logger) -> None:
        """Stop recording, also where the training broke in the middle of a recorded batch."""
        _routing(state).records = None


def _routing(state: State) -> RoutingState:
    routing = routing_state(state.model)
    assert routing is not None
    return routing
