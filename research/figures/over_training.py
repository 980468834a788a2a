"""Step encodings and gate values over the training, from a run's TensorBoard files (Figure 6 over time)."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from itt_composer.analysis.figure_style import line_style, tidy
from itt_composer.analysis.tensorboard import RunLogs

# The scalars of the callbacks: router/layer2/step2/gate_q50, step_encoding/layer2/step0/mean.
SCALAR = re.compile(r'layer(\d+)/step(\d+)/(\w+)')
CALLBACK = {'router': 'router_weights', 'step_encoding': 'step_encodings'}
POINTS = 200


def read_training(folder: Path, source: str) -> pd.DataFrame:
    """Read the scalars of one of the callbacks.

    Args:
        folder: of one run's TensorBoard files; the training configs write ``runs/tensorboard/<run name>``.
        source: ``router`` (the callback ``router_weights``) or ``step_encoding`` (``step_encodings``).

    Returns:
        Columns ``source``, ``layer``, ``step``, ``quantity``, ``batch``, ``value``;
        of a long training every n-th value, at most 200 of each.

    Raises:
        ValueError: the TensorBoard files are missing, or hold nothing of the callback.
    """
    if not any(folder.glob('events.out.tfevents.*')):
        raise ValueError(f'{folder}: no TensorBoard files; pass the folder of one run, runs/tensorboard/<run name>')
    rows = []
    for name, curve in RunLogs(folder).curves(f'{source}/').items():
        if match := SCALAR.fullmatch(name):
            layer, step, quantity = match.groups()
            for batch in sorted(curve)[:: -(-len(curve) // POINTS)]:
                rows.append((source, int(layer), int(step), quantity, batch, curve[batch]))
    if not rows:
        raise ValueError(f'{folder}: no {source}/layer<n>/step<t> scalars; train with the callback {CALLBACK[source]}')
    return pd.DataFrame(rows, columns=['source', 'layer', 'step', 'quantity', 'batch', 'value'])


def plot(table: pd.DataFrame) -> Figure:
    """Plot mean step encodings, or median gate values with their 5 % to 95 % range, over the training.

    Args:
        table: the result of :func:`read_training`.
    """
    middle, label = {
        'step_encoding': ('mean', 'mean of the step encoding'),
        'router': ('gate_q50', 'gate value (median, 5 to 95 %)'),
    }[table['source'].iloc[0]]
    layers = sorted(set(table['layer']))
    figure = Figure(figsize=(1.4 + 2.2 * len(layers), 2.9), dpi=140, layout='constrained')
    axes = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axis, layer in zip(axes, layers, strict=True):
        for step, rows in table[table['layer'] == layer].groupby('step'):
            style = line_style(int(step))
            curve = rows[rows['quantity'] == middle]
            axis.plot(curve['batch'], curve['value'], label=f'step {step}', markersize=3, linewidth=1.2, **style)
            low, high = (rows[rows['quantity'] == f'gate_q{q}']['value'] for q in ('05', '95'))
            if len(low):
                axis.fill_between(curve['batch'], low, high, color=style['color'], alpha=0.12, linewidth=0)
        axis.set_title(f'layer {layer}', fontsize=9)
        axis.set_xlabel('batch', fontsize=8)
        axis.ticklabel_format(axis='y', useOffset=False)
        tidy(axis)
    axes[0].set_ylabel(label, fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center', fontsize=8, frameon=False)
    return figure
