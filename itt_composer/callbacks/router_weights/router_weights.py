"""Logs which weights the routers give, and which tokens they choose (Figure 6, right; Section 4.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
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
from itt_composer.training.trainer_time import Interval, is_last_batch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def summarise(tokens: RoutedTokens) -> dict[str, float]:
    """Mean and quantiles of the weights, the share of tokens chosen and the threshold (a score, not a weight)."""
    quantiles = np.quantile(tokens.weight_N, QUANTILES)
    return {
        'weight_mean': float(tokens.weight_N.mean()),
        **{f'weight_q{100 * q:02.0f}': float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        'share_chosen': float(tokens.chosen_N.mean()),
        'threshold': tokens.threshold,
    }


class RouterWeights(Callback):
    """Records the routers during one training batch an interval, and logs what they did.

    All microbatches of the batch are taken together. Scalars are means over the ranks, of the quantiles too (each rank
    has the same number of tokens); histogram and picture show the tokens of the first rank. Between recorded batches
    the model records nothing.

    Args:
        interval: time between recordings, a time string; the first and the last batch of the training are recorded too.

    Raises:
        ValueError: for a bad interval; as soon as the model is seen, where it has no routers.
    """

    def __init__(self, interval: str = '100ba'):
        self.interval = Interval('router_weights.interval', interval)
        self._recording = False
        self._gathered: dict[LayerStep, list[Any]] = {}

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model in which nothing is routed."""
        if not routed_layers(state.model):
            raise ValueError(
                'router_weights: the model has no routers to watch; it needs thinking: itt and token_routing: true'
            )

    def batch_start(self, state: State, logger: Logger) -> None:
        """Decide whether this batch is recorded."""
        self._recording = self.interval.due(state) or is_last_batch(state)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Start with nothing; this event comes again when the trainer retries a batch that ran out of memory."""
        self._gathered = {}

    def before_forward(self, state: State, logger: Logger) -> None:
        """Switch recording on for a microbatch's forward pass."""
        if self._recording:
            _routing(state).records = []

    def after_forward(self, state: State, logger: Logger) -> None:
        """Take the records and switch recording off, so that activation checkpointing's second forward adds none."""
        if not self._recording:
            return
        records, _routing(state).records = _routing(state).records, None
        assert records is not None, 'switched on before the forward pass'
        for record in records:
            self._gathered.setdefault((record.layer + 1, record.step), []).append(record)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Log the batch."""
        if not self._recording:
            return
        self._recording = False
        tokens = {layer_step: join(records) for layer_step, records in self._gathered.items()}
        self._gathered = {}

        metrics = {
            f'router/{layer}-{step}/{name}': value
            for (layer, step), routed in tokens.items()
            for name, value in summarise(routed).items()
        }
        mean = state.device.tensor_to_device(torch.tensor(list(metrics.values())))
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        logger.log_metrics(dict(zip(metrics, mean.tolist(), strict=True)))

        batch = state.timestamp.batch.value
        for (layer, step), routed in tokens.items():
            log_histogram(logger, f'router/{layer}-{step}/weight', routed.weight_N, batch)
        log_picture(logger, 'router/weights', lambda: plot_router_weights(histogram(tokens)))

    def close(self, state: State, logger: Logger) -> None:
        """Leave no recording on, also where the training stopped in the middle of a recorded batch."""
        _routing(state).records = None

    def state_dict(self) -> dict[str, Any]:
        """Where the interval stands."""
        return {'interval': self.interval.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the interval."""
        self.interval.load_state_dict(state['interval'])


def _routing(state: State) -> RoutingState:
    routing = routing_state(state.model)
    assert routing is not None
    return routing
