"""The manifest of a run, ``<runs>/<run_name>/manifest.json``: its config, versions, device, data and source."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import itt_composer
from itt_composer.atomic import write_json
from itt_composer.checks import read_json
from itt_composer.training.run_error import RunError

PACKAGES = (
    *('itt_composer', 'mosaicml', 'llm-foundry', 'mosaicml-streaming', 'torch', 'triton', 'transformers'),
    *('tokenizers', 'numpy'),
)
SHORTEST_SECRET = 4  # Shorter values of environment variables, such as 1, stand in other texts by chance.


def manifest_path(config: DictConfig) -> Path | None:
    """Where a run's manifest goes; None where its folder is not on this machine."""
    runs = str(config.variables.get('runs') or '')
    return None if not runs or '://' in runs else Path(runs) / config.run_name / 'manifest.json'


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a run; None where there is none.

    Raises:
        RunError: the file is damaged.
    """
    try:
        found = read_json(path)
        return None if found is None else {**found, 'config': dict(found['config'])}
    except (ValueError, KeyError, TypeError):
        raise RunError(f'{path}: not a manifest of a run; remove it, or set run_name= to train another run') from None


def write_manifest(config: DictConfig, path: Path, batch: int, data: str | None) -> None:
    """Write the manifest of a run that starts now, or goes on, after ``batch`` batches.

    What the manifest says of those batches moves to ``before``: each entry is the config and the environment that
    trained up to its ``until_batch``. Entries of batches that are trained again are dropped.

    Args:
        config: resolved, from here on.
        path: of the manifest.
        batch: trained batches.
        data: fingerprint of the data.
    """
    now = {'environment': environment(), 'data_sha256': data, 'config': recorded(config)}
    then = read_manifest(path) if batch else None
    before = []
    if then is not None:
        current = {key: then.get(key) for key in ('started', *now)}
        for part in (*then.get('before', []), {'until_batch': batch, **current}):
            before.append({**part, 'until_batch': min(batch, part['until_batch'])})
            if part['until_batch'] >= batch:
                break
        if all(before[-1][key] == now[key] for key in now):
            before.pop()
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    write_json({'started': started, **now, **({'before': before} if before else {})}, path)


def record_not_finite(path: Path, problem: str) -> None:
    """Add to the manifest of a run how its loss or weights ceased to be finite; a start that goes on removes it."""
    if (manifest := read_manifest(path)) is not None:
        write_json({**manifest, 'not_finite': problem}, path)


def recorded(config: DictConfig) -> dict[str, Any]:
    """The config as the manifest holds it: in place of an environment variable's value its name and a digest."""
    names = config.variables.get('environment') or []
    values = {os.environ[name]: name for name in names if len(os.environ.get(name, '')) >= SHORTEST_SECRET}
    return _without(OmegaConf.to_container(config), values)


def _without(part: Any, values: dict[str, str]) -> Any:
    if isinstance(part, dict):
        return {key: _without(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [_without(value, values) for value in part]
    for value in sorted(values, key=len, reverse=True) if isinstance(part, str) else ():
        digest = hashlib.sha256(value.encode()).hexdigest()[:8]
        part = part.replace(value, f'${{oc.env:{values[value]}}}#{digest}')
    return part


def environment() -> dict[str, Any]:
    """What a result depends on beside its config."""
    import torch

    return {
        'python': platform.python_version(),
        'packages': {name: _version(name) for name in PACKAGES},
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        'gpus': torch.cuda.device_count(),
        'world_size': int(os.environ.get('WORLD_SIZE', 1)),
        'threads': torch.get_num_threads(),
        'platform': '-'.join((platform.system(), platform.machine(), *platform.libc_ver())),
        'revision': revision(),
    }


def revision() -> str:
    """The package's version, and in a checkout of this project the commit, ``-dirty`` with changed tracked files."""
    folder = Path(itt_composer.__file__).resolve().parents[1]
    git = ['git', '-C', str(folder)]
    try:
        # Fails in the repository of another project that the package is installed in.
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        run([*git, 'ls-files', '--error-unmatch', 'itt_composer/__init__.py', 'setup.py'])
        commit = run([*git, 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty']).stdout.strip()
        return f'{itt_composer.__version__} (commit {commit})'
    except (OSError, subprocess.CalledProcessError):
        return itt_composer.__version__


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path('/proc/cpuinfo')
    lines = information.read_text().splitlines() if information.is_file() else []
    names = (line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor())
