"""Pictures of a study: Figure 4 (loss against tokens and FLOPs), differences to a baseline, steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from itt_composer.analysis.figure_style import line_style, tidy
from itt_composer.paper.tables import paper_rows
from research.study.results import ALL_DOMAINS
from research.study.statistics import by_seed, filled, of_shared_seeds, selections_of

FLOPS_UNITS = ((1e21, 'ZFLOPs'), (1e18, 'EFLOPs'), (1e15, 'PFLOPs'), (1e12, 'TFLOPs'))
LEGEND_WIDTH = 3.2
"""Inches beside the panels."""
SHOWN_FRACTION = 0.75
"""The loss axis shows this fraction of the evaluations: the first ones are steep and would hide the rest."""


def loss_curves(table: pd.DataFrame, variants: Sequence[str], title: str) -> Figure:
    """Plot Figure 4: training loss, and evaluation loss (threshold routing) against tokens and exact training FLOPs.

    Lines are means over the seeds that all variants have; the shade is one standard error to each side.
    """
    rows = of_shared_seeds(table)
    rows = rows[rows.domain == ALL_DOMAINS]
    unit, name = next(((u, n) for u, n in FLOPS_UNITS if rows.exact_flops.max() >= u), FLOPS_UNITS[-1])
    panels = (
        ('tokens', 1e6, 'loss_train', 'training tokens, millions', 'training loss'),
        ('tokens', 1e6, 'loss_threshold', 'training tokens, millions', 'evaluation loss'),
        ('exact_flops', unit, 'loss_threshold', f'training {name}, exact count', 'evaluation loss'),
    )
    figure = Figure(figsize=(11 + LEGEND_WIDTH, 4), dpi=140, layout='constrained')
    for axis, (x, unit, y, x_label, y_label) in zip(figure.subplots(1, 3), panels, strict=True):
        top, bottom = -math.inf, math.inf
        for i, variant in enumerate(variants):
            curve = rows[rows.variant == variant].groupby('batch').agg(x=(x, 'mean'), y=(y, 'mean'), error=(y, 'sem'))
            if curve.empty:
                continue
            style = line_style(i)
            axis.plot(curve.x / unit, curve.y, label=variant if axis is figure.axes[0] else None,
                      markersize=3.5, linewidth=1.2, **style)  # fmt: skip
            low, high = curve.y - curve.error.fillna(0), curve.y + curve.error.fillna(0)
            axis.fill_between(curve.x / unit, low, high, color=style['color'], alpha=0.15, linewidth=0)
            top, bottom = max(top, curve.y.quantile(SHOWN_FRACTION)), min(bottom, curve.y.min())
        if math.isfinite(top) and top > bottom:
            axis.set_ylim(bottom - 0.04 * (top - bottom), top)
        _plain_axes(axis, x_label, f'{y_label}, nats per token')
    figure.suptitle(title, fontsize=10)
    _legend(figure)
    return figure


def difference_curves(table: pd.DataFrame, variants: Sequence[str], baseline: str) -> Figure:
    """Plot loss minus the baseline's at the same tokens, paired by seed, a panel for each selection.

    The shade runs from the lowest to the highest seed.
    """
    rows = filled(table)
    rows = rows[rows.domain == ALL_DOMAINS]
    selections = selections_of(table)
    figure = Figure(figsize=(4.5 * len(selections) + LEGEND_WIDTH, 4), dpi=140, layout='constrained')
    panels = figure.subplots(1, len(selections), sharey=True, squeeze=False)[0]
    for axis, (column, selection) in zip(panels, selections.items(), strict=True):
        level = rows[rows.variant == baseline].set_index(['seed', 'tokens'])[column]
        shown = []
        for i, variant in enumerate(variants):
            if variant == baseline:
                continue
            difference = (rows[rows.variant == variant].set_index(['seed', 'tokens'])[column] - level).dropna()
            curve = difference.groupby('tokens').agg(['mean', 'min', 'max'])
            if curve.empty:
                continue
            style, x = line_style(i), curve.index / 1e6
            axis.plot(x, curve['mean'], label=variant if axis is figure.axes[0] else None,
                      markersize=3.5, linewidth=1.2, **style)  # fmt: skip
            axis.fill_between(x, curve['min'], curve['max'], color=style['color'], alpha=0.15, linewidth=0)
            shown += [*curve['min'].iloc[len(curve) // 3 :], *curve['max'].iloc[len(curve) // 3 :]]
        axis.axhline(0, color='black', linewidth=0.8)
        if shown := [value for value in shown if math.isfinite(value)]:
            margin = 0.1 * (max(shown) - min(shown)) or 0.01
            axis.set_ylim(min(*shown, 0) - margin, max(*shown, 0) + margin)
        _plain_axes(axis, 'training tokens, millions', '')
        axis.set_title(selection, fontsize=9)
    panels[0].set_ylabel('difference, nats per token', fontsize=9)
    figure.suptitle(f'Evaluation loss minus that of {baseline}', fontsize=10)
    _legend(figure)
    return figure


def steps_figure(table: pd.DataFrame, families: dict[str, dict[int, str]]) -> Figure:
    """Plot final loss against steps, beside the mean accuracy of the paper's 162M models (Figure 5).

    Args:
        table: the study's results.
        families: the line's name to number of steps to variant, such as ``{'ITT': {1: 'llama', 4: 'itt_x4'}}``.
    """
    values, paper = by_seed(of_shared_seeds(table)), paper_rows()
    figure = Figure(figsize=(8, 3.6), dpi=140, layout='constrained')
    ours, theirs = figure.subplots(1, 2)
    for i, (family, steps) in enumerate(families.items()):
        style = line_style(i + 1)
        points = {n: values[variant].dropna() for n, variant in steps.items() if variant in values}
        errors = [point.sem() if len(point) > 1 else 0 for point in points.values()]
        ours.errorbar(list(points), [point.mean() for point in points.values()], errors,
                      label=family, markersize=5, capsize=3, linewidth=1.2, **style)  # fmt: skip
        accuracy = {
            n: paper[f'{variant}_162m']['average'] for n, variant in steps.items() if f'{variant}_162m' in paper
        }
        theirs.plot(list(accuracy), list(accuracy.values()), markersize=5, linewidth=1.2, **style)
    _plain_axes(ours, 'steps including the base pass', 'final evaluation loss, nats per token')
    ours.set_title('here, threshold routing; mean ± standard error', fontsize=9)
    _plain_axes(theirs, 'steps including the base pass', 'mean accuracy of ten tasks, %')
    theirs.set_title('the paper, 162M, 50 B tokens (Table 1)', fontsize=9)
    for axis in (ours, theirs):
        axis.set_xticks([1, 2, 3, 4], ['1\n(dense)', '2', '3', '4'])
    ours.legend(fontsize=8, frameon=False)
    return figure


def _legend(figure: Figure) -> None:
    figure.legend(loc='outside right center', fontsize=8, frameon=False)


def _plain_axes(axis: Axes, x_label: str, y_label: str) -> None:
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(y_label, fontsize=9)
    tidy(axis, 'both')
