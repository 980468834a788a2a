"""Gate values of the routers, and the tokens they route (Figure 6, right; Section 4.4, routing analysis).

Shape suffixes: N tokens, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from itt_composer.analysis.figure_style import COLOURS, tidy
from itt_composer.model import ITTLayer, RoutingRecord, thinking_layers

LayerStep = tuple[int, int]
"""Layer, counted from 0, and step, counted from 1. Figure 7 of the paper writes layer 2, step 2 as 3-2."""


class RoutedTokens(NamedTuple):
    """What one router did with the tokens of a batch."""

    gate_N: np.ndarray
    """Gate value of each token, float: the norm of its score, sigmoid or tanh."""
    routed_N: np.ndarray
    """Whether the token was routed to the step, bool."""
    threshold: float
    """Score above which threshold routing routes a token, mean over the microbatches."""


def routed_layers(model: nn.Module) -> dict[int, ITTLayer]:
    """Return the layers that have routers, by their number counted from 0."""
    return {i: layer for i, layer in thinking_layers(model).items() if layer.router_TD is not None}


def join(records: Sequence[RoutingRecord]) -> RoutedTokens:
    """Join the records of a batch's microbatches for one layer and step."""
    return RoutedTokens(
        gate_N=torch.cat([record.gate_BS.flatten() for record in records]).float().cpu().numpy(),
        routed_N=torch.cat([record.routed_BS.flatten() for record in records]).cpu().numpy(),
        threshold=torch.stack([record.threshold for record in records]).float().mean().item(),
    )


def histogram(tokens: Mapping[LayerStep, RoutedTokens], bins: int = 40) -> pd.DataFrame:
    """Count the tokens by gate value; gate values that are not finite are left out.

    Args:
        tokens: by (layer, step).
        bins: over the range of the gate values, [0, 1], or [-1, 1] where one is negative (``tanh``).

    Returns:
        A row for each layer, step and bin: ``layer``, ``step``, ``low``, ``high``, and its tokens that were ``routed``
        and ``not_routed``.
    """
    lowest = -1.0 if any((routed.gate_N < 0).any() for routed in tokens.values()) else 0.0
    edges = np.linspace(lowest, 1, bins + 1)
    parts = []
    for (layer, step), of_step in tokens.items():
        finite_N = np.isfinite(of_step.gate_N)
        routed, not_routed = (
            np.histogram(of_step.gate_N[mask_N & finite_N], edges)[0]
            for mask_N in (of_step.routed_N, ~of_step.routed_N)
        )
        columns = {'low': edges[:-1], 'high': edges[1:], 'routed': routed, 'not_routed': not_routed}
        parts.append(pd.DataFrame({'layer': layer, 'step': step, **columns}))
    return pd.concat(parts, ignore_index=True)


def plot_router_weights(table: pd.DataFrame) -> Figure:
    """Plot the distribution of the gate values (Figure 6, right): a column for each step, a row for each layer.

    Args:
        table: the result of :func:`histogram`.
    """
    layers, steps = sorted(set(table['layer'])), sorted(set(table['step']))
    figure = Figure(figsize=(0.9 + 1.5 * len(steps), 1.2 + 1.5 * len(layers)), dpi=140, layout='constrained')
    axes = figure.subplots(len(layers), len(steps), sharex=True, squeeze=False)
    for (layer, step), bins in table.groupby(['layer', 'step']):
        axis = axes[layers.index(layer), steps.index(step)]
        percent = 100 / max(1, (bins['routed'] + bins['not_routed']).sum())
        routed, not_routed = percent * bins['routed'], percent * bins['not_routed']
        bars = {'width': bins['high'] - bins['low'], 'align': 'edge'}
        axis.bar(bins['low'], routed, color=COLOURS[1], label='routed to the step', **bars)
        axis.bar(bins['low'], not_routed, bottom=routed, color=COLOURS[5], label='not routed', **bars)
        axis.set_title(f'layer {layer}, step {step}\n{routed.sum():.0f} % routed', fontsize=8)
        tidy(axis)
        axis.grid(False)
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel('gate value', fontsize=8)
    figure.suptitle('Gate values of the routers (layers from 0)', fontsize=10)
    figure.supylabel('tokens (%)', fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    return figure
