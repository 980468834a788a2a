"""Nuclear norm of each layer's attention gradients (Section 2, Figure 2)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from composer.core import Precision, State
from composer.loggers import Logger
from composer.utils import dist
from matplotlib.figure import Figure

from itt_composer.analysis.attention_gradients import (
    LayerProjection,
    attention_gradients,
    attention_projections,
    nuclear_norm,
)
from itt_composer.analysis.figure_style import line_style, tidy
from itt_composer.callbacks.pictures import log_picture
from itt_composer.training.trainer_time import Interval, PeriodicCallback, is_last_batch

log = logging.getLogger(__name__)


def gradient_nuclear_norms(model: torch.nn.Module) -> dict[LayerProjection, float]:
    """Return the nuclear norm of the gradient of every attention projection, by layer (from 0) and name.

    The ranks share the work, so every rank must call this; each gets all norms.
    GPT-2's ``c_attn`` gives ``q_proj``, ``k_proj`` and ``v_proj``; its ``c_proj`` is called ``o_proj``. A projection
    without a gradient (frozen) is left out.
    """
    norms: dict[LayerProjection, float] = {}
    device = next(model.parameters()).device
    for layer_projection, gradient in attention_gradients(model):
        mine = len(norms) % dist.get_world_size() == dist.get_global_rank()
        norms[layer_projection] = nuclear_norm(gradient) if mine else 0.0
    shared = torch.tensor(list(norms.values()), device=device)
    dist.all_reduce(shared)
    return dict(zip(norms, shared.tolist(), strict=True))


def plot_gradient_nuclear_norms(norms: Mapping[LayerProjection, float]) -> Figure:
    """Plot the nuclear norm over the layers (Figure 2), one line for each projection, on a logarithmic scale.

    Args:
        norms: by layer (counted from 0) and projection.
    """
    layers = sorted({layer for layer, _ in norms})
    names = list(dict.fromkeys(name for _, name in norms))
    figure = Figure(figsize=(max(5.2, 1.6 + 0.3 * len(layers)), 3.4), dpi=140, layout='constrained')
    axis = figure.subplots()
    for i, name in enumerate(names):
        values = [norms.get((layer, name), np.nan) for layer in layers]
        axis.plot(layers, values, label=name, markersize=5, linewidth=1.4, **line_style(i))
    if all(value > 0 for value in norms.values()):
        axis.set_yscale('log')
    axis.set_xticks(layers)
    axis.set_xlabel('layer', fontsize=9)
    axis.set_ylabel('nuclear norm of the gradient', fontsize=9)
    tidy(axis)
    figure.legend(loc='outside right center', fontsize=8, frameon=False)
    return figure


class GradientNuclearNorm(PeriodicCallback):
    """Log the nuclear norm of every layer's attention gradients for one training batch per interval.

    The gradient is that of the complete batch (every microbatch, mean over the ranks), before gradient clipping: it is
    read on :attr:`.Event.AFTER_BACKWARD` of the last microbatch, because clipping runs on
    :attr:`.Event.AFTER_TRAIN_BATCH`, where Composer runs algorithms before callbacks. A float16 loss scale is divided
    out.

    Args:
        interval: time between two measurements, a time string; the first and the last batch are measured too.

    Raises:
        ValueError: the interval is no time string; at INIT, the model has no attention projection of a known name.
    """

    def __init__(self, interval: str = '500ba'):
        self.interval = Interval('gradient_nuclear_norm.interval', interval)
        self._measuring = False
        self._samples = self._samples_left = 0

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model without attention projections of a known name."""
        if not attention_projections(state.model):
            raise ValueError(
                'gradient_nuclear_norm: no attention projections found; name them as in LLaMA '
                '(layers.N.self_attn.q_proj) or GPT-2 (h.N.attn.c_attn), or remove the callback'
            )

    def batch_start(self, state: State, logger: Logger) -> None:
        """Decide whether this batch is measured."""
        self._measuring = self.interval.due(state) or is_last_batch(state)
        if self._measuring:
            self._samples = batch_size(state.batch)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Reset the count of samples; Composer sends this event again when a batch ran out of memory."""
        self._samples_left = self._samples

    def after_backward(self, state: State, logger: Logger) -> None:
        """Measure after the last microbatch."""
        if not self._measuring:
            return
        self._samples_left -= batch_size(state.batch)
        if self._samples_left > 0:
            return
        self._measuring = False
        # On a GPU there is always a scaler, and its scale is not one; Composer scales by it in float16 alone.
        scaled = state.precision == Precision.AMP_FP16 and state.scaler is not None
        loss_scale = state.scaler.get_scale() if scaled else 1.0
        norms = {key: norm / loss_scale for key, norm in gradient_nuclear_norms(state.model).items()}
        logger.log_metrics({f'gradient_nuclear_norm/layer{n}/{name}': norm for (n, name), norm in norms.items()})
        log_picture(logger, 'gradient_nuclear_norm/layers', lambda: plot_gradient_nuclear_norms(norms))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Warn where the microbatches did not add up to the batch."""
        if self._measuring:
            self._measuring = False
            log.warning(
                'gradient_nuclear_norm: the samples of the microbatches do not add up to the batch; it is not measured'
            )


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor."""
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return batch.shape[0]
