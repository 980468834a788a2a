"""``OUT/manifest.json``: written last, with a fingerprint of every file that no index names the hash of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itt_composer.atomic import write_json
from itt_composer.data_folder import fingerprint


def write_manifest(out: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Add ``files`` (hashes of tokenizer and indexes) and ``sha256`` (of the rest of the manifest), and write it."""
    manifest = {**content, 'files': file_hashes(out)}
    manifest['sha256'] = fingerprint(manifest)
    write_json(manifest, out / 'manifest.json')
    return manifest


def file_hashes(out: Path) -> dict[str, str]:
    """SHA-256 of the tokenizer's files and of every ``index.json``, which in turn holds the shards' hashes."""
    paths = [*out.glob('tokenizer/*'), *out.glob('train/**/index.json'), *out.glob('validation/**/index.json')]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}
