"""The manifest of a run: what it was, with which versions and on what, ``<runs>/<run_name>/manifest.json``."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from itt_composer.atomic import write_text

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    *('itt_composer', 'mosaicml', 'llm-foundry', 'mosaicml-streaming', 'torch', 'triton', 'transformers'),
    *('tokenizers', 'numpy'),
)


def manifest_path(config: DictConfig) -> Path | None:
    """Where a run's manifest goes; None where its folder is not on this machine."""
    runs = str(config.variables.get('runs') or '')
    return None if not runs or '://' in runs else Path(runs) / config.run_name / 'manifest.json'


def write_manifest(config: DictConfig, path: Path) -> None:
    """Write the manifest of the run that is about to start; a resumed run's says how it was resumed last."""
    write_text(json.dumps(manifest(config), indent=2) + '\n', path)


def manifest(config: DictConfig) -> dict[str, Any]:
    """Config, versions, device and source revision."""
    return {
        'started': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'environment': environment(),
        'config': OmegaConf.to_container(config),
    }


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


def revision() -> str | None:
    """The commit of the source, ``-dirty`` where tracked files were changed; None outside a git work tree."""
    command = ['git', '-C', str(REPOSITORY), 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
