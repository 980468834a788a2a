"""Step encodings and router weights over the training, from a run's TensorBoard files (Figure 6 as it came about)."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from itt_composer.analysis.figure_style import line_style, tidy
from itt_composer.training.tensorboard import RunLogs

# What the callbacks router_weights and step_encodings log: router/3-2/weight_q50, step_encoding/3-0/mean.
SCALAR = re.compile(r'(\d+)-(\d+)/(\w+)')
CALLBACK = {'router': 'router_weights', 'step_encoding': 'step_encodings'}
POINTS = 200


def read_training(folder: Path, source: str) -> pd.DataFrame:
    """What one of the callbacks logged.

    Args:
        folder: of one run's TensorBoard files; the run files write ``runs/tensorboard/<run name>``.
        source: ``router`` (the callback ``router_weights``) or ``step_encoding`` (``step_encodings``).

    Returns:
        Columns ``source``, ``layer``, ``step``, ``quantity``, ``batch``, ``value``;
        of a long training every n-th time, so that at most 200 are left of each.

    Raises:
        ValueError: no TensorBoard files there, or nothing of the callback in them.
    """
    if not any(folder.glob('events.out.tfevents.*')):
        raise ValueError(f'{folder}: no TensorBoard files; give the folder of one run, runs/tensorboard/<run name>')
    rows = []
    for name, curve in RunLogs(folder).curves(f'{source}/').items():
        if match := SCALAR.fullmatch(name):
            layer, step, quantity = match.groups()
            for batch in sorted(curve)[:: -(-len(curve) // POINTS)]:
                rows.append((source, int(layer), int(step), quantity, batch, curve[batch]))
    if not rows:
        raise ValueError(f'{folder}: the run logged nothing under {source}/; add the callback {CALLBACK[source]}')
    return pd.DataFrame(rows, columns=['source', 'layer', 'step', 'quantity', 'batch', 'value'])


def plot(table: pd.DataFrame) -> Figure:
    """Mean step encodings, or median router weights with the range from 5 % to 95 % of the tokens, over the training.

    Args:
        table: what :func:`read_training` gives.
    """
    middle, label = {
        'step_encoding': ('mean', 'average step encoding value'),
        'router': ('weight_q50', 'router weight (median, 5-95 %)'),
    }[table['source'].iloc[0]]
    layers = sorted(set(table['layer']))
    figure = Figure(figsize=(1.4 + 2.2 * len(layers), 2.9), dpi=140, layout='constrained')
    axes = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axis, layer in zip(axes, layers, strict=True):
        for step, rows in table[table['layer'] == layer].groupby('step'):
            style = line_style(int(step))
            curve = rows[rows['quantity'] == middle]
            axis.plot(curve['batch'], curve['value'], label=f'step {step}', markersize=3, linewidth=1.2, **style)
            low, high = (rows[rows['quantity'] == f'weight_q{q}']['value'] for q in ('05', '95'))
            if len(low):
                axis.fill_between(curve['batch'], low, high, color=style['color'], alpha=0.12, linewidth=0)
        axis.set_title(f'layer {layer}', fontsize=9)
        axis.set_xlabel('batch', fontsize=8)
        axis.ticklabel_format(axis='y', useOffset=False)
        tidy(axis)
    axes[0].set_ylabel(label, fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center', fontsize=8, frameon=False)
    return figure
