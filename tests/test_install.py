"""The lock, the metadata and what is installed agree; the light parts import without the heavy ones."""

import subprocess
import sys
from importlib.metadata import entry_points, requires, version

from conftest import REPO
from packaging.requirements import Requirement

LOCK = [Requirement(line) for line in (REPO / 'requirements.lock').read_text().splitlines() if line.strip()]


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or any(
        requirement.marker.evaluate({'extra': extra}) for extra in ('', 'dev', 'eval')
    )


def test_every_locked_version_is_exact_and_installed():
    for requirement in filter(applies, LOCK):
        assert [spec.operator for spec in requirement.specifier] == ['=='], requirement
        assert version(requirement.name) in requirement.specifier, requirement


def test_the_lock_covers_the_metadata():
    locked = {requirement.name.lower().replace('_', '-') for requirement in LOCK}
    for requirement in filter(applies, map(Requirement, requires('itt_composer'))):
        assert requirement.name.lower().replace('_', '-') in locked, requirement
        assert version(requirement.name) in requirement.specifier, requirement


def test_entry_points_name_what_is_there():
    ours = [
        entry
        for group in ('llmfoundry_models', 'llmfoundry_algorithms', 'llmfoundry_callbacks')
        for entry in entry_points(group=group)
        if entry.value.startswith('itt_composer.')
    ]
    assert ours
    for entry in ours:
        assert callable(entry.load())


def test_imports_stay_light():
    """In one process: each module may import more than the one before."""
    code = """
import sys
import itt_composer.flops
assert not {'torch', 'transformers', 'composer'} & set(sys.modules)
import itt_composer.ops
assert not {'transformers', 'composer'} & set(sys.modules)
import itt_composer.model
assert not {'composer', 'llmfoundry'} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
