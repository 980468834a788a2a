"""Intervals by bootstrap over documents (or samples), because the tokens of one document are not independent.

N tokens, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000
# An interval from fewer would not be one of 95 %: from two documents it holds the mean half of the time, from five
# 84 % of the time, from 17, 91 %.
MIN_DOCUMENTS = 10


class Estimate(NamedTuple):
    """A value and its 95 % interval, nan where there are too few documents for one."""

    value: float
    low: float
    high: float


def sums_by_document(values: Sequence[np.ndarray], document: np.ndarray) -> np.ndarray:
    """Each document's sum of each of the C ``values``, [D, C]; all of the shape of ``document``, its number."""
    _, document_N = np.unique(document, return_inverse=True)
    return np.stack([np.bincount(document_N.ravel(), weights=np.ravel(value)) for value in values], axis=-1)


def ratio_of_sums(sums_D2: np.ndarray) -> Estimate:
    """sum(a) / sum(b) over the documents' a, b; a mean over tokens, from each one's sum and number of tokens."""
    return _estimate(sums_D2, lambda sums: sums[..., 0] / sums[..., 1])


def difference_of_ratios(sums_D4: np.ndarray) -> Estimate:
    """sum(a) / sum(b) - sum(c) / sum(d) over the documents' a, b, c, d: one mean less another."""
    return _estimate(sums_D4, lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3])


def spearman(x: np.ndarray, y: np.ndarray, document: np.ndarray) -> Estimate:
    """Spearman's rank correlation of all tokens' x and y, ties at their mean rank; documents are what is drawn again.

    The ranks are those of all tokens, also in the resamples: the statistic is then one of sums over documents, and
    millions of tokens cost no more than thousands. nan where all x, or all y, are equal.
    """
    x_N, y_N = (stats.rankdata(values) for values in (x, y))
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    sums_D6 = sums_by_document([np.ones_like(x_N), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N], document)

    def pearson(sums: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        variances = (xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)
        return (xy / n - x * y / n**2) / np.sqrt(variances)

    return _estimate(sums_D6, pearson)


def _estimate(sums_DC: np.ndarray, statistic: Callable[[np.ndarray], Any]) -> Estimate:
    """``statistic`` of the columns' sums, with the percentile interval over resamples of the D documents."""

    def of_documents(index: np.ndarray, axis: int = -1) -> Any:
        counts = np.apply_along_axis(np.bincount, -1, index.astype(int), minlength=len(sums_DC))
        return statistic(counts @ sums_DC)

    with np.errstate(invalid='ignore', divide='ignore'):
        value = float(statistic(sums_DC.sum(0)))
        if len(sums_DC) < MIN_DOCUMENTS or not np.isfinite(value):
            return Estimate(value, float('nan'), float('nan'))
        interval = stats.bootstrap(
            (np.arange(len(sums_DC)),), of_documents, n_resamples=RESAMPLES, method='percentile', vectorized=True,
            batch=200, rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    return Estimate(value, float(interval.low), float(interval.high))
