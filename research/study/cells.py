"""Cells and tables of a report, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Return a table; columns that are empty in all rows are left out."""
    if not rows:
        return ''
    columns = [name for name in rows[0] if any(row.get(name) for row in rows)]
    lines = ['| ' + ' | '.join(columns) + ' |', '|---' * len(columns) + '|']
    return '\n'.join([*lines, *('| ' + ' | '.join(row.get(name, '') for name in columns) + ' |' for row in rows)])


def mean_cell(values: pd.Series) -> str:
    """Return the mean, and its standard error where there are several values; says so where a run diverged."""
    if not math.isfinite(values.mean()):
        return f'diverged ({values.eq(math.inf).sum()} of {len(values)})'
    error = f' ± {values.sem():.4f}' if len(values) > 1 else ''
    return f'{values.mean():.4f}{error}'


def p_cell(p: float) -> str:
    """Return a p value; empty where there is none."""
    return '' if math.isnan(p) else '<0.001' if p < 0.001 else f'{p:.3f}'
