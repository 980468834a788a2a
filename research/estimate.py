"""One form for every value with a 95 % interval, by bootstrap or by Student's t."""

from __future__ import annotations

import math
from typing import NamedTuple


class Estimate(NamedTuple):
    """A value and its 95 % interval; NaN where there are too few data for one."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def text(self, digits: int = 4) -> str:
        """Return ``-0.0242 [-0.0359, -0.0125]``, or the value alone where there is no interval."""
        interval = '' if math.isnan(self.low) else f' [{self.low:+.{digits}f}, {self.high:+.{digits}f}]'
        return f'{self.value:+.{digits}f}{interval}'
