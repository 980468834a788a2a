"""Trainings side by side on one machine: each has names of its own for streaming's shared memory."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

RANGES, NAMES = 9000, 100


def use_own_names(run: Path) -> None:
    """Have streaming number its shared memory from a place that depends on the run's folder.

    It looks for the first free number from zero and takes it a little later, so two trainings that start at the same
    moment take the same one, and one of them dies. All ranks of a run must begin at the same place.
    """
    from streaming.base.shared import prefix

    digest = hashlib.sha256(str(run.resolve()).encode()).digest()
    first = int.from_bytes(digest[:8], 'big') % RANGES * NAMES
    prefix._each_prefix_int = lambda: itertools.count(first)
