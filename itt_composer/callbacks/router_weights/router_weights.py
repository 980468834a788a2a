"""Which weights the routers give, and which tokens they choose (Figure 6, right; Section 4.4, routing analysis).

Shape suffixes: N tokens of all microbatches of one rank, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from matplotlib.figure import Figure

from itt_composer.callbacks.pictures import log_histogram, log_picture
from itt_composer.figure_style import COLOURS, to_array
from itt_composer.model import ITTLayer, thinking_layers
from itt_composer.trainer_time import Interval, is_last_batch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

LayerStep = tuple[int, int]
"""Layer and step as people count them, both from 1; Figure 7 writes (3, 2) as 3-2."""


class RoutedTokens(NamedTuple):
    """What one router did with the tokens of a batch."""

    weight_N: np.ndarray
    """The router's weight of each token, float."""
    chosen_N: np.ndarray
    """Whether the token took the step, bool."""
    threshold: float
    """The score above which the ``threshold`` rule would choose, mean over the microbatches."""


def summarise(tokens: RoutedTokens) -> dict[str, float]:
    """Mean and quantiles of the weights, the share of tokens chosen and the threshold (a score, not a weight)."""
    quantiles = np.quantile(tokens.weight_N, QUANTILES)
    return {
        'weight_mean': float(tokens.weight_N.mean()),
        **{f'weight_q{100 * q:02.0f}': float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        'share_chosen': float(tokens.chosen_N.mean()),
        'threshold': tokens.threshold,
    }


def plot_router_weights(tokens: Mapping[LayerStep, RoutedTokens], bins: int = 40) -> np.ndarray:
    """Distribution of the router weights (Figure 6, right), one panel a step, one row a layer; chosen tokens stand out.

    Args:
        tokens: by (layer, step), both counted from 1.
        bins: bars over the range of the weights, [0, 1], or [-1, 1] where some weight is negative (``tanh``).

    Returns:
        The picture, uint8 [H, W, 3].
    """
    layers = sorted({layer for layer, _ in tokens})
    steps = sorted({step for _, step in tokens})
    low = -1.0 if any(t.weight_N.min() < 0 for t in tokens.values()) else 0.0
    edges = np.linspace(low, 1, bins + 1)

    figure = Figure(figsize=(1.4 + 2.2 * len(steps), 1.1 + 1.5 * len(layers)), dpi=140, layout='constrained')
    axes = figure.subplots(len(layers), len(steps), sharex=True, squeeze=False)
    for (layer, step), routed in tokens.items():
        axis = axes[layers.index(layer), steps.index(step)]
        percent_N = np.full(routed.weight_N.size, 100 / routed.weight_N.size)
        axis.hist(
            [routed.weight_N[routed.chosen_N], routed.weight_N[~routed.chosen_N]],
            bins=edges,
            weights=[percent_N[routed.chosen_N], percent_N[~routed.chosen_N]],
            stacked=True,
            color=[COLOURS[1], COLOURS[5]],
            label=['chosen for the step', 'not chosen'],
        )
        axis.set_title(f'{layer}-{step}:  {routed.chosen_N.mean():.0%} chosen', fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[['top', 'right']].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel('router weight', fontsize=8)
    figure.suptitle(f'Router weights ({layers[-1]}-{steps[-1]} is step {steps[-1]} of layer {layers[-1]})', fontsize=10)
    figure.supylabel('tokens (%)', fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    return to_array(figure)


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
            for layer in routed_layers(state.model).values():
                layer.records = []

    def after_forward(self, state: State, logger: Logger) -> None:
        """Take the records and switch recording off, so that activation checkpointing's second forward adds none."""
        if not self._recording:
            return
        for number, layer in routed_layers(state.model).items():
            assert layer.records is not None, 'switched on before the forward pass'
            for record in layer.records:
                self._gathered.setdefault((number, record.step), []).append(record)
            layer.records = None

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
        log_picture(logger, 'router/weights', lambda: plot_router_weights(tokens))

    def close(self, state: State, logger: Logger) -> None:
        """Leave no recording on, also where the training stopped in the middle of a recorded batch."""
        for layer in routed_layers(state.model).values():
            layer.records = None

    def state_dict(self) -> dict[str, Any]:
        """Where the interval stands."""
        return {'interval': self.interval.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the interval."""
        self.interval.load_state_dict(state['interval'])


def routed_layers(model: torch.nn.Module) -> dict[int, ITTLayer]:
    """The layers with routers, by their number counted from 1."""
    return {i + 1: layer for i, layer in thinking_layers(model).items() if layer.router_TD is not None}


def join(records: list[Any]) -> RoutedTokens:
    """One batch out of the records of its microbatches for one layer and step."""
    return RoutedTokens(
        weight_N=torch.cat([record.weight_BS.flatten() for record in records]).float().cpu().numpy(),
        chosen_N=torch.cat([record.chosen_BS.flatten() for record in records]).cpu().numpy(),
        threshold=torch.stack([record.threshold for record in records]).float().mean().item(),
    )
