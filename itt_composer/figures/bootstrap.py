"""Intervals by bootstrap over rows (documents, samples), because the tokens of one row are not independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def ratio_of_sums(numerator_N: np.ndarray, denominator_N: np.ndarray) -> Estimate:
    """sum(numerator) / sum(denominator) over N rows; a mean over tokens, from each row's sum and number of tokens."""
    sums_N2 = np.stack([numerator_N, denominator_N], axis=-1).astype(float)
    return _estimate(sums_N2, lambda sums: sums[..., 0] / sums[..., 1])


def difference_of_ratios(sums_N4: np.ndarray) -> Estimate:
    """sum(a) / sum(b) - sum(c) / sum(d) over N rows of a, b, c, d: one mean less another, in pairs of rows."""
    return _estimate(sums_N4.astype(float), lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3])


def spearman(x_rows: Sequence[np.ndarray], y_rows: Sequence[np.ndarray]) -> Estimate:
    """Spearman's rank correlation of all tokens' x and y, ties at their mean rank; rows are what is drawn again.

    The ranks are those of all tokens, also in the resamples: the statistic is then one of sums over rows, and millions
    of tokens cost no more than thousands. nan where all x, or all y, are equal.
    """
    lengths = np.cumsum([len(x_S) for x_S in x_rows])[:-1]
    x_N, y_N = (stats.rankdata(np.concatenate(rows)) for rows in (x_rows, y_rows))
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    products = np.stack([np.ones_like(x_N), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N], axis=-1)
    sums_R6 = np.stack([part.sum(0) for part in np.split(products, lengths)])

    def pearson(sums: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        variances = (xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)
        return (xy / n - x * y / n**2) / np.sqrt(variances)

    return _estimate(sums_R6, pearson)


def _estimate(sums_NC: np.ndarray, statistic: Callable[[np.ndarray], Any]) -> Estimate:
    """``statistic`` of the columns' sums, with the percentile interval over resamples of the N rows."""

    def of_rows(index: np.ndarray, axis: int = -1) -> Any:
        counts = np.apply_along_axis(np.bincount, -1, index.astype(int), minlength=len(sums_NC))
        return statistic(counts @ sums_NC)

    with np.errstate(invalid='ignore', divide='ignore'):
        value = float(statistic(sums_NC.sum(0)))
        if len(sums_NC) < 2 or not np.isfinite(value):
            return Estimate(value, float('nan'), float('nan'))
        interval = stats.bootstrap(
            (np.arange(len(sums_NC)),), of_rows, n_resamples=RESAMPLES, method='percentile', vectorized=True, batch=200,
            rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    return Estimate(value, float(interval.low), float(interval.high))
