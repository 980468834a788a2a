"""Which weights the routers give, and which tokens they choose (Figure 6, right; Section 4.4, routing analysis).

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
"""Layer and step as people count them, both from 1; Figure 7 writes (3, 2) as 3-2."""


class RoutedTokens(NamedTuple):
    """What one router did with the tokens of a batch."""

    weight_N: np.ndarray
    """The router's weight of each token, float."""
    chosen_N: np.ndarray
    """Whether the token took the step, bool."""
    threshold: float
    """The score above which the ``threshold`` rule would choose, mean over the microbatches."""


def routed_layers(model: nn.Module) -> dict[int, ITTLayer]:
    """The layers with routers, by their number counted from 1."""
    return {i + 1: layer for i, layer in thinking_layers(model).items() if layer.router_TD is not None}


def join(records: Sequence[RoutingRecord]) -> RoutedTokens:
    """One batch out of the records of its microbatches for one layer and step."""
    return RoutedTokens(
        weight_N=torch.cat([record.gate_BS.flatten() for record in records]).float().cpu().numpy(),
        chosen_N=torch.cat([record.routed_BS.flatten() for record in records]).cpu().numpy(),
        threshold=torch.stack([record.threshold for record in records]).float().mean().item(),
    )


def histogram(tokens: Mapping[LayerStep, RoutedTokens], bins: int = 40) -> pd.DataFrame:
    """How many tokens have which weight.

    Args:
        tokens: by (layer, step), both counted from 1.
        bins: over the range of the weights, [0, 1], or [-1, 1] where some weight is negative (``tanh``).

    Returns:
        A row for each layer, step and bin: ``layer``, ``step``, ``low``, ``high``, and the tokens in it that were
        ``chosen`` and ``not_chosen``.
    """
    lowest = -1.0 if any(routed.weight_N.min() < 0 for routed in tokens.values()) else 0.0
    edges = np.linspace(lowest, 1, bins + 1)
    parts = []
    for (layer, step), routed in tokens.items():
        chosen, not_chosen = (
            np.histogram(routed.weight_N[mask_N], edges)[0] for mask_N in (routed.chosen_N, ~routed.chosen_N)
        )
        columns = {'low': edges[:-1], 'high': edges[1:], 'chosen': chosen, 'not_chosen': not_chosen}
        parts.append(pd.DataFrame({'layer': layer, 'step': step, **columns}))
    return pd.concat(parts, ignore_index=True)


def plot_router_weights(table: pd.DataFrame) -> Figure:
    """Distribution of the router weights (Figure 6, right), one panel a step, one row a layer; chosen tokens stand out.

    Args:
        table: what :func:`histogram` gives.
    """
    layers, steps = sorted(set(table['layer'])), sorted(set(table['step']))
    figure = Figure(figsize=(1.4 + 2.2 * len(steps), 1.1 + 1.5 * len(layers)), dpi=140, layout='constrained')
    axes = figure.subplots(len(layers), len(steps), sharex=True, squeeze=False)
    for (layer, step), bins in table.groupby(['layer', 'step']):
        axis = axes[layers.index(layer), steps.index(step)]
        percent = 100 / (bins['chosen'] + bins['not_chosen']).sum()
        low, width = bins['low'], bins['high'] - bins['low']
        bars = {'width': width, 'align': 'edge'}
        axis.bar(low, percent * bins['chosen'], color=COLOURS[1], label='chosen for the step', **bars)
        axis.bar(
            low, percent * bins['not_chosen'], bottom=percent * bins['chosen'], color=COLOURS[5], label='not chosen',
            **bars,
        )  # fmt: skip
        axis.set_title(f'{layer}-{step}:  {percent * bins["chosen"].sum() / 100:.0%} chosen', fontsize=9)
        tidy(axis)
        axis.grid(False)
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel('router weight', fontsize=8)
    figure.suptitle(f'Router weights ({layers[-1]}-{steps[-1]} is step {steps[-1]} of layer {layers[-1]})', fontsize=10)
    figure.supylabel('tokens (%)', fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    return figure
