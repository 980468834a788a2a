"""How many processes are worth starting here."""

from __future__ import annotations

import os
from pathlib import Path

_QUOTA = Path('/sys/fs/cgroup/cpu.max')


def usable_cpus() -> int:
    """CPUs that this process may use: of its affinity (taskset, SLURM), within its cgroup's quota (containers)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(count, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no such cgroup, or no quota: 'max'
        return count
