"""What is being converted: the settings, tokenizer and source files that a manifest names, and how two of them differ.

``OUT/.conversion/job.json`` holds a job while it is worked on; the same keys stand first in ``OUT/manifest.json``.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.input.sources import Source
from data_prep.tokens.tokenizer import TokenizerRequest, saved_sha256

# Raise it when the same input would give other shards.
FORMAT_VERSION = 3
_PACKAGES = ('mosaicml-streaming', 'tokenizers', 'transformers', 'sentencepiece', 'numpy', 'xxhash')


def describe(settings: Mapping[str, int | str], request: TokenizerRequest, source: Source) -> dict[str, Any]:
    """The job that these inputs ask for."""
    return {
        'format_version': FORMAT_VERSION,
        'settings': dict(settings),
        'tokenizer': {'requested': request.name, 'requested_sha256': request.sha256},
        'source': {
            'folder': str(source.folder),
            'files': [asdict(file) for file in source.files],
            'left_out': [asdict(one) for one in source.left_out],
        },
        'versions': {'python': platform.python_version()}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
    }


def check_same(out: Path, job: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a ValueError that says what differs if ``out`` holds another job than the wanted one."""
    differences = list(_differences(job, wanted))
    if (out / 'tokenizer').is_dir() and saved_sha256(out / 'tokenizer') != job['tokenizer']['sha256']:
        differences.append(f'{out / "tokenizer"} was changed since')
    if differences:
        raise ValueError(
            f'--out: {out} holds another conversion ({"; ".join(differences)}); '
            'pass another folder, or remove this one to convert anew'
        )


def _differences(job: Mapping[str, Any], wanted: Mapping[str, Any]) -> Sequence[str]:
    if job['format_version'] != wanted['format_version']:
        return [f'format version {job["format_version"]} there, {wanted["format_version"]} asked for']
    result = []
    for key, value in wanted['settings'].items():
        if job['settings'][key] != value:
            result.append(f'{key} {job["settings"][key]} there, {value} asked for')
    there, asked = job['tokenizer'], wanted['tokenizer']
    if there['requested_sha256'] != asked['requested_sha256']:
        result.append(f'tokenizer {there["requested"]} there, {asked["requested"]} asked for')
    before = {file['path']: file for file in job['source']['files']}
    now = {file['path']: file for file in wanted['source']['files']}
    changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
    if changed:
        path = changed[0]
        what = 'is not in it' if path not in before else 'is gone' if path not in now else 'has changed'
        more = f', and {len(changed) - 1} more differ' if len(changed) > 1 else ''
        result.append(f'source file {path} {what}{more}')
    return result


def check_versions(out: Path, job: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a ValueError if other versions of the packages that decide the shards have begun the job in ``out``."""
    there, here = job['versions'], wanted['versions']
    others = [f'{package} {there[package]}' for package in _PACKAGES if there[package] != here[package]]
    if others:
        raise ValueError(
            f'--out: {out} was begun with {", ".join(others)}; install that, or remove the folder to convert anew'
        )
