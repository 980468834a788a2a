"""Statistics of a study: means over seeds, differences paired by seed, and how much data a variant needs.

All variants share one variance: ``loss = variant + seed + residual`` is fitted by least squares to all main runs, and
s^2 is the residual variance with its degrees of freedom. The difference of two variants is the mean over their n shared
seeds, with standard error s sqrt(2 / n) and Student's t. A variance of each difference alone has two degrees of freedom
with three seeds, and calls significant what happens to agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from research.estimate import Estimate
from research.study.results import ALL_DOMAINS, final

CONFIDENCE, SIGNIFICANCE = 0.95, 0.05
SELECTIONS = {'loss_threshold': 'threshold routing (causal)', 'loss_top_k': 'training selection (non-causal)'}


class Spread(NamedTuple):
    """Pooled standard deviation of a run's loss about variant + seed, and its degrees of freedom."""

    deviation: float
    freedom: int

    @classmethod
    def of(cls, losses: pd.DataFrame) -> Spread:
        """Fit variant + seed to final losses, a row for each seed and a column for each variant; inf is left out."""
        runs = losses.replace(math.inf, math.nan).stack().dropna()
        seeds, variants = (runs.index.get_level_values(level) for level in (0, 1))
        design = np.hstack([pd.get_dummies(variants).to_numpy(float), pd.get_dummies(seeds).to_numpy(float)])
        fit, _, rank, _ = np.linalg.lstsq(design, runs.to_numpy(), rcond=None)
        freedom = len(runs) - int(rank)
        squares = float(((runs.to_numpy() - design @ fit) ** 2).sum())
        return cls(math.sqrt(squares / freedom) if freedom else math.nan, freedom)


class Difference(NamedTuple):
    """``variant`` minus ``baseline``, with the p value of a two-sided t test with the pooled variance."""

    variant: str
    baseline: str
    estimate: Estimate
    p: float
    each: tuple[float, ...]
    """One value for each shared seed."""


def difference(losses: pd.DataFrame, variant: str, baseline: str, spread: Spread) -> Difference:
    """Return the mean difference over the shared seeds; without any, or where a run diverged, it has no interval."""
    each = (losses[variant] - losses[baseline]).dropna().to_numpy(float)
    mean = float(each.mean()) if len(each) else math.nan
    if not math.isfinite(mean) or not spread.freedom:
        return Difference(variant, baseline, Estimate(mean), math.nan, tuple(each))
    error = spread.deviation * math.sqrt(2 / len(each))
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, spread.freedom))
    p = 2 * float(stats.t.sf(abs(mean) / error, spread.freedom))
    return Difference(variant, baseline, Estimate(mean, mean - half, mean + half), p, tuple(each))


def holm(p: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method; NaN stays, and does not count."""
    known = [i for i in np.argsort(p) if not math.isnan(p[i])]
    corrected, largest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def selections_of(table: pd.DataFrame) -> dict[str, str]:
    """Return those of ``SELECTIONS`` that some main run is evaluated with."""
    losses = table[table.stage == 'main'][list(SELECTIONS)]
    return {column: selection for column, selection in SELECTIONS.items() if losses[column].notna().any()}


def filled(table: pd.DataFrame) -> pd.DataFrame:
    """Return the main runs; a model that routes no tokens has its one loss under both selections."""
    main = table[table.stage == 'main']
    return main.assign(loss_top_k=main.loss_top_k.fillna(main.loss_threshold))


def of_shared_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return the main runs of the seeds that every variant has, for comparable means; all, if there are none."""
    main = filled(table)
    variants_of_seed = main.groupby('seed').variant.nunique()
    shared = main[main.seed.isin(variants_of_seed.index[variants_of_seed == main.variant.nunique()])]
    return main if shared.empty else shared


def by_seed(table: pd.DataFrame, column: str = 'loss_threshold') -> pd.DataFrame:
    """Return final values, a row for each seed and a column for each variant; infinite for a run that diverged."""
    last = final(filled(table))
    return last.fillna({column: math.inf}).pivot(index='seed', columns='variant', values=column)


def sharing_seeds(table: pd.DataFrame, variants: Sequence[str], baseline: str) -> list[str]:
    """Return those of ``variants`` that have a seed in common with ``baseline``."""
    losses = by_seed(table)
    return [variant for variant in variants if (losses[variant] - losses[baseline]).notna().any()]


def differences(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], column: str) -> tuple[list[Difference], Spread]:
    """Return the difference of each (variant, baseline), and the variance that they share."""
    losses = by_seed(table, column)
    spread = Spread.of(losses)
    return [difference(losses, *pair, spread) for pair in pairs if set(pair) <= set(losses)], spread


def by_domain(table: pd.DataFrame, variants: Sequence[str], baseline: str) -> dict[str, list[Difference]]:
    """Return the differences to ``baseline`` within each domain, each domain with a variance of its own."""
    rows, result = filled(table), {}
    for domain, part in rows[rows.domain != ALL_DOMAINS].groupby('domain'):
        losses = part.pivot(index='seed', columns='variant', values='loss_threshold')
        if baseline in losses:
            spread = Spread.of(losses)
            result[str(domain)] = [difference(losses, v, baseline, spread) for v in variants if v in losses]
    return result


def crossing(x: np.ndarray, loss: np.ndarray, level: float) -> float:
    """Return where a curve first reaches ``level``, by linear interpolation; infinite where it never does."""
    below = np.flatnonzero(loss <= level)
    if not len(below):
        return math.inf
    i = below[0]
    if i == 0:
        return float(x[0])
    fraction = (loss[i - 1] - level) / (loss[i - 1] - loss[i])
    return float(x[i - 1] + fraction * (x[i] - x[i - 1]))


def data_fractions(table: pd.DataFrame, variant: str, baseline: str) -> pd.Series:
    """Return for each seed the fraction of the tokens after which the variant has the baseline's final loss.

    It is infinite where the variant never has it, and an upper bound: the learning rate of the variant is still high
    there, and that of the baseline's last loss is low.
    """
    rows = filled(table)
    rows = rows[rows.domain == ALL_DOMAINS]
    fractions = {}
    for seed, level in by_seed(table).get(baseline, pd.Series(dtype=float)).dropna().items():
        curve = rows[(rows.variant == variant) & (rows.seed == seed)].sort_values('tokens')
        if len(curve):
            tokens = curve.tokens.to_numpy(float)
            fractions[seed] = crossing(tokens, curve.loss_threshold.to_numpy(), level) / tokens[-1]
    return pd.Series(fractions, dtype=float)
