"""How many processes this machine may run."""

import os

import pytest

from data_prep import cpus


@pytest.mark.parametrize(('quota', 'usable'), [('max 100000', 3), ('150000 100000', 2), ('10000 100000', 1), (None, 3)])
def test_processes_are_as_many_as_the_cpus_that_may_be_used(monkeypatch, tmp_path, quota, usable):
    """Affinity (taskset, SLURM) and the quota of a container, not the machine's cores."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 1, 2})
    monkeypatch.setattr(cpus, '_QUOTA', tmp_path / 'cpu.max')
    if quota is not None:
        (tmp_path / 'cpu.max').write_text(quota + '\n')
    assert cpus.usable_cpus() == usable
