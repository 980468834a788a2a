"""The thinking step encodings phi of a model (Figure 6, middle; Section 4.4).

Shape suffixes: T extra steps, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn

from itt_composer.analysis.figure_style import line_style, tidy
from itt_composer.model import ITTLayer, thinking_layers
from itt_composer.model.sharding import unsharded, whole


def encoded_layers(model: nn.Module) -> dict[int, ITTLayer]:
    """Return the layers that have step encodings, by their number counted from 0."""
    return {i: layer for i, layer in thinking_layers(model).items() if layer.phi_TD is not None}


def step_encodings(model: nn.Module) -> dict[int, Tensor]:
    """Return phi of each thinking layer, float32 [T+1, D], by the layer's number counted from 0.

    Under FSDP this is a collective that every rank must join.
    """
    phi = {}
    for number, layer in unsharded(model, encoded_layers(model)):
        assert layer.phi_TD is not None, 'encoded_layers returns only layers that have one'
        phi[number] = whole(layer.phi_TD).float().clone()
    return phi


def step_encoding_table(phi: Mapping[int, Tensor]) -> pd.DataFrame:
    """Return mean, standard deviation and Euclidean norm of phi[t] over its D values, by ``layer`` and ``step``."""
    rows = [
        (layer, step, phi_D.mean().item(), phi_D.std(unbiased=False).item(), phi_D.norm().item())
        for layer, phi_TD in sorted(phi.items())
        for step, phi_D in enumerate(phi_TD)
    ]
    return pd.DataFrame(rows, columns=['layer', 'step', 'mean', 'std', 'norm'])


def plot_step_encodings(table: pd.DataFrame) -> Figure:
    """Plot the mean of phi[t] for each step (Figure 6, middle), one line for each layer.

    Args:
        table: columns ``layer`` (from 0), ``step`` (0 is the base pass) and ``mean``.
    """
    figure = Figure(figsize=(5.2, 3.4), dpi=140, layout='constrained')
    axis = figure.subplots()
    for i, (layer, rows) in enumerate(table.groupby('layer')):
        axis.plot(rows['step'], rows['mean'], label=f'layer {layer}', markersize=5, linewidth=1.4, **line_style(i))
    last_step = table['step'].max()
    axis.set_xticks(range(last_step + 1), ['0\n(base pass)', *map(str, range(1, last_step + 1))])
    axis.set_xlabel('step', fontsize=9)
    axis.set_ylabel('mean of the step encoding', fontsize=9)
    # An offset such as "+1" at the axis' end hides where the base pass starts.
    axis.ticklabel_format(axis='y', useOffset=False)
    tidy(axis)
    figure.legend(loc='outside right center', fontsize=8, frameon=False)
    return figure
