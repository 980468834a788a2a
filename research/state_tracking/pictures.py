"""The figures of the state-tracking study: loss by position, reach, other ratios and numbers of steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from itt_composer.analysis.figure_style import line_style, tidy
from research.state_tracking.study import Study

REFERENCES = ('dense_4', 'loop_x4')
"""Shown in each panel."""


def _panels(study: Study, variants: Collection[str]) -> dict[str, list[str]]:
    """Return the variants of each group that has some: those of ``REFERENCES``, then its own."""
    groups = study.settings['groups'].items()
    shown = {name: [v for v in dict.fromkeys((*REFERENCES, *group)) if v in variants] for name, group in groups}
    return {name: shown[name] for name, group in groups if set(group) & set(variants)}


def positions(study: Study, main: pd.DataFrame) -> Figure:
    """Plot the loss at each position, mean over seeds: a panel for each group with finished runs."""
    curves = {
        str(variant): np.mean([[float(x) for x in text.split()] for text in own.loss_by_position], axis=0)
        for variant, own in main.groupby('variant')
    }
    panels = _panels(study, curves)
    figure = Figure(figsize=(1.4 + 4.2 * len(panels), 4), dpi=140, layout='constrained')
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, variants) in zip(axes, panels.items(), strict=True):
        for i, variant in enumerate(variants):
            axis.plot(curves[variant], label=variant, markersize=3, linewidth=1.2, **line_style(i))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel('position', fontsize=9)
        axis.legend(fontsize=7, frameon=False)
        tidy(axis, 'both')
    figure.axes[0].set_ylabel('loss, nats', fontsize=9)
    return figure


def reach(main: pd.DataFrame, variants: Sequence[str]) -> Figure:
    """Plot the last position with an accuracy of at least 90 %: a point for each seed, a bar for their mean."""
    figure = Figure(figsize=(7, 0.8 + 0.28 * len(variants)), dpi=140, layout='constrained')
    axis = figure.subplots()
    for row, variant in enumerate(variants):
        own = main[main.variant == variant].reach
        axis.plot(own, [row] * len(own), 'o', color=line_style(1)['color'], markersize=4, alpha=0.7)
        axis.plot([own.mean()], [row], '|', color='black', markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(variants)), variants)
    axis.invert_yaxis()
    axis.set_xlabel('last position with an accuracy of at least 90 %', fontsize=9)
    tidy(axis, 'x')
    return figure


def elastic(study: Study, table: pd.DataFrame, main: pd.DataFrame) -> Figure:
    """Plot the loss at other ratios or numbers of steps than in the training against FLOPs, mean over seeds.

    A panel for each group with finished runs. A star marks the setting of the training. ITT removes steps on the left
    of it, with the thresholds of the training.
    """
    dense = main[main.variant == 'dense_4'].flops.iloc[0]
    panels = _panels(study, set(table.variant))
    figure = Figure(figsize=(1.4 + 4.2 * len(panels), 4.5), dpi=140, layout='constrained')
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, variants) in zip(axes, panels.items(), strict=True):
        for i, variant in enumerate(variants):
            own = table[table.variant == variant].groupby(['ratios', 'flops'], as_index=False).loss.mean()
            own = own.sort_values('flops')
            trained = main[main.variant == variant]
            in_training = own.flops == trained.flops.iloc[0]
            ratios = own.ratios.str.split('/').map(lambda values: {*values} - {'0'})
            (trained_ratio,) = ratios[in_training]
            style = {**line_style(i), 'markersize': 3.5, 'linewidth': 1.1}
            steps = own[ratios.map(trained_ratio.issuperset)]
            others = own[in_training | (ratios.map(bool) & (ratios != trained_ratio))]
            axis.plot(steps.flops / dense, steps.loss, label=variant, **style)
            axis.plot(others.flops / dense, others.loss, **{**style, 'linestyle': '--'})
            axis.plot([trained.flops.iloc[0] / dense], [trained.loss.mean()], '*', color=style['color'], markersize=11)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel('FLOPs at test time, dense_4 = 1', fontsize=9)
        axis.set_yscale('log')
        axis.yaxis.set_major_formatter('{x:g}')
        axis.yaxis.set_minor_formatter('{x:g}')
        axis.legend(fontsize=7, frameon=False)
        tidy(axis, 'both')
    figure.axes[0].set_ylabel('loss, nats', fontsize=9)
    figure.suptitle('solid: other numbers of steps; dashed: other token ratios', fontsize=9)
    return figure
