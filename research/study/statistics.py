"""What the runs of a study say: means over seeds, differences paired by seed, and how much data an arm needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from research.study.results import ALL_DOMAINS, final

CONFIDENCE = 0.95
RULES = {'loss_causal': 'causal rule', 'loss_ahead': 'training rule, looks ahead'}


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds, its standard error, and half the width of its 95 % interval by Student's t.

    With three seeds t is 4.3, so that the interval is 2.5 standard deviations wide to each side: three seeds tell a
    difference from none only where it is some 2.5 times as large as it varies from seed to seed. With one seed there is
    neither error nor interval, nor where a run diverged: the mean is infinite then.
    """

    mean: float
    error: float
    half_width: float
    n: int

    @classmethod
    def of(cls, values: np.ndarray | pd.Series) -> Estimate:
        """From one value a seed."""
        values = np.asarray(values, dtype=float)
        n = len(values)
        if n < 2 or not np.isfinite(values).all():
            return cls(float(values.mean()) if n else math.nan, math.nan, math.nan, n)
        error = float(values.std(ddof=1) / math.sqrt(n))
        return cls(float(values.mean()), error, error * float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)), n)

    @property
    def verdict(self) -> str:
        """What the interval allows to say of a difference in loss."""
        if math.isinf(self.mean):
            return 'a run diverged'
        if self.n < 3:
            return 'too few seeds to say'
        if abs(self.mean) <= self.half_width:
            return 'not told from none'
        return 'lower' if self.mean < 0 else 'higher'


def rules_of(table: pd.DataFrame) -> dict[str, str]:
    """Those of ``RULES`` that some main run is evaluated under: the causal one alone where nothing looks ahead."""
    losses = table[table.stage == 'main'][list(RULES)]
    return {column: rule for column, rule in RULES.items() if losses[column].notna().any()}


def filled(table: pd.DataFrame) -> pd.DataFrame:
    """The main runs, where a model that routes nothing has its one loss under both rules."""
    main = table[table.stage == 'main']
    return main.assign(loss_ahead=main.loss_ahead.fillna(main.loss_causal))


def of_shared_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The main runs of the seeds that every arm has, for means that stand beside one another; all, if there are none.

    Losses differ more from seed to seed than from one arm to most others.
    """
    main = filled(table)
    arms_of_seed = main.groupby('seed').arm.nunique()
    shared = main[main.seed.isin(arms_of_seed.index[arms_of_seed == main.arm.nunique()])]
    return main if shared.empty else shared


def by_seed(table: pd.DataFrame, column: str = 'loss_causal') -> pd.DataFrame:
    """Final values, a row for each seed and a column for each arm; infinite for a run that diverged."""
    last = final(filled(table))
    return last.fillna({column: math.inf}).pivot(index='seed', columns='arm', values=column)


def sharing_seeds(table: pd.DataFrame, arms: Sequence[str], baseline: str) -> list[str]:
    """Those of ``arms`` that can be compared with ``baseline``: they have a seed in common with it."""
    losses = by_seed(table)
    return [arm for arm in arms if (losses[arm] - losses[baseline]).notna().any()]


def paired(table: pd.DataFrame, arm: str, baseline: str, column: str = 'loss_causal') -> Estimate:
    """The arm's final loss less the baseline's, over the seeds that both have."""
    values = by_seed(table, column)
    if arm not in values or baseline not in values:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return Estimate.of((values[arm] - values[baseline]).dropna())


def paired_by_domain(table: pd.DataFrame, arm: str, baseline: str) -> dict[str, Estimate]:
    """The same within each domain."""
    rows = filled(table)
    result = {}
    for domain, part in rows[rows.domain != ALL_DOMAINS].groupby('domain'):
        values = part.pivot(index='seed', columns='arm', values='loss_causal')
        if arm in values and baseline in values:
            result[str(domain)] = Estimate.of((values[arm] - values[baseline]).dropna())
    return result


def crossing(x: np.ndarray, loss: np.ndarray, level: float) -> float:
    """Where a curve first comes down to ``level``, between its points along a line; infinite where it never does."""
    below = np.flatnonzero(loss <= level)
    if not len(below):
        return math.inf
    i = below[0]
    if i == 0:
        return float(x[0])
    fraction = (loss[i - 1] - level) / (loss[i - 1] - loss[i])
    return float(x[i - 1] + fraction * (x[i] - x[i - 1]))


def data_shares(table: pd.DataFrame, arm: str, baseline: str, column: str = 'loss_causal') -> pd.Series:
    """For each seed the share of the tokens at which the arm has the baseline's final loss; infinite if it never has.

    Both follow one learning-rate schedule to its end, so that an arm part of the way has not yet had the low rates
    that the baseline's last loss owes much to: the share is an upper bound of what a shorter schedule would need.
    """
    rows = filled(table)
    rows = rows[rows.domain == ALL_DOMAINS]
    shares = {}
    for seed, level in by_seed(table, column).get(baseline, pd.Series(dtype=float)).dropna().items():
        curve = rows[(rows.arm == arm) & (rows.seed == seed)].sort_values('tokens')
        if len(curve):
            tokens = curve.tokens.to_numpy(float)
            shares[seed] = crossing(tokens, curve[column].to_numpy(), level) / tokens[-1]
    return pd.Series(shares, dtype=float)


def loss_at_flops(table: pd.DataFrame, arm: str, baseline: str, column: str = 'loss_causal') -> Estimate:
    """The arm's loss where it has spent the exact training FLOPs of the whole baseline run, less the baseline's.

    The learning rate of the arm is then still high, which counts against it; a plain model with as many FLOPs a token
    is the fair comparison.
    """
    rows = filled(table)
    rows = rows[rows.domain == ALL_DOMAINS]
    differences = []
    for seed, level in by_seed(table, column).get(baseline, pd.Series(dtype=float)).dropna().items():
        budget = rows[(rows.arm == baseline) & (rows.seed == seed)].exact_flops.max()
        curve = rows[(rows.arm == arm) & (rows.seed == seed)].sort_values('exact_flops')
        if len(curve) and curve.exact_flops.min() <= budget:
            differences.append(np.interp(budget, curve.exact_flops, curve[column]) - level)
    return Estimate.of(np.array(differences))
