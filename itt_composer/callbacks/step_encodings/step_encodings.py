"""What the thinking step encodings phi have learned (Figure 6, middle; Section 4.4).

Shape suffixes: T extra steps, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from matplotlib.figure import Figure

from itt_composer.callbacks.pictures import log_picture
from itt_composer.callbacks.sharding import unsharded, whole
from itt_composer.figure_style import line_style, to_array
from itt_composer.model import ITTLayer, thinking_layers
from itt_composer.trainer_time import Interval


def step_encodings(model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """phi of each thinking layer, float32 [T+1, D], by the layer's number counted from 1.

    Under FSDP this is a collective that every rank must join.
    """
    phi = {}
    for number, layer in unsharded(model, encoded_layers(model)):
        assert layer.phi_TD is not None, 'encoded_layers keeps only layers that have one'
        phi[number] = whole(layer.phi_TD).float().clone()
    return phi


def plot_step_encodings(mean_by_layer: Mapping[int, Sequence[float]]) -> np.ndarray:
    """Average step encoding value per step (Figure 6, middle), one line a layer.

    Args:
        mean_by_layer: mean of phi[t] for t = 0..T, by the layer's number counted from 1.

    Returns:
        The picture, uint8 [H, W, 3].
    """
    figure = Figure(figsize=(5.2, 3.4), dpi=140, layout='constrained')
    axis = figure.subplots()
    for i, (number, means) in enumerate(sorted(mean_by_layer.items())):
        axis.plot(range(len(means)), means, label=f'layer {number}', markersize=5, linewidth=1.4, **line_style(i))
    last_step = max(len(means) for means in mean_by_layer.values()) - 1
    axis.set_xticks(range(last_step + 1), ['0\n(first pass)', *map(str, range(1, last_step + 1))])
    axis.set_xlabel('thinking step', fontsize=9)
    axis.set_ylabel('average step encoding value', fontsize=9)
    # An offset such as "+1" at the axis' end hides the value that every encoding starts from.
    axis.ticklabel_format(axis='y', useOffset=False)
    axis.tick_params(labelsize=8)
    axis.grid(axis='y', linewidth=0.4, alpha=0.6)
    axis.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside right center', fontsize=8, frameon=False)
    return to_array(figure)


class StepEncodings(Callback):
    """Logs mean and Euclidean norm of phi[t] of every thinking layer at an interval and at the end of the training.

    Args:
        interval: time between looks, a time string; the first batch and the end of the training are looked at too.

    Raises:
        ValueError: for a bad interval; as soon as the model is seen, where it has no step encodings.
    """

    def __init__(self, interval: str = '100ba'):
        self.interval = Interval('step_encodings.interval', interval)
        self._logged_at: Time | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model without step encodings."""
        if not encoded_layers(state.model):
            raise ValueError(
                'step_encodings: the model has no step encodings; it needs thinking: itt and step_encoding: true'
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log where an interval has begun."""
        if self.interval.due(state):
            log_encodings(state, logger)
            self._logged_at = state.timestamp.batch

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log what the training ended with."""
        if self._logged_at != state.timestamp.batch:
            log_encodings(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """Where the interval stands."""
        return {'interval': self.interval.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the interval."""
        self.interval.load_state_dict(state['interval'])


def encoded_layers(model: torch.nn.Module) -> dict[int, ITTLayer]:
    """The layers with step encodings, by their number counted from 1."""
    return {i + 1: layer for i, layer in thinking_layers(model).items() if layer.phi_TD is not None}


def log_encodings(state: State, logger: Logger) -> None:
    """Log mean and norm of each phi[t], and the picture of the means."""
    phi = step_encodings(state.model)
    mean_by_layer = {number: phi_TD.mean(dim=1).tolist() for number, phi_TD in phi.items()}
    norm_by_layer = {number: phi_TD.norm(dim=1).tolist() for number, phi_TD in phi.items()}
    for name, by_layer in (('mean', mean_by_layer), ('norm', norm_by_layer)):
        logger.log_metrics(
            {
                f'step_encoding/{number}-{t}/{name}': value
                for number, values in by_layer.items()
                for t, value in enumerate(values)
            }
        )
    log_picture(logger, 'step_encoding/means', lambda: plot_step_encodings(mean_by_layer))
