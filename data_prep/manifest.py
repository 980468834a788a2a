"""``OUT/manifest.json``: written last, with a fingerprint of every file that no index names the hash of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.durable import write_json


def write_manifest(out: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Add ``files`` (hashes of tokenizer and indexes) and ``sha256`` (of the rest of the manifest), and write it."""
    manifest = {**content, 'files': file_hashes(out)}
    manifest['sha256'] = fingerprint(manifest)
    write_json(out / 'manifest.json', manifest)
    return manifest


def file_hashes(out: Path) -> dict[str, str]:
    """SHA-256 of the tokenizer's files and of every ``index.json``, which in turn holds the shards' hashes."""
    paths = [*out.glob('tokenizer/*'), *out.glob('train/**/index.json'), *out.glob('validation/**/index.json')]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all of a manifest, or of a part of it, but ``sha256``."""
    content = {key: value for key, value in manifest.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
