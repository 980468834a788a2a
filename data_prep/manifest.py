"""``OUT/manifest.json``: written last, with a fingerprint of every file that no index names the hash of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itt_composer.atomic import write_json
from itt_composer.data_folder import fingerprint


def write_manifest(out: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Add hashes, and write it.

    ``files``: of the tokenizer and the indexes. ``content_sha256``: of what was made, whenever and from which folder.
    ``sha256``: of the rest of the manifest.
    """
    files = file_hashes(out)
    manifest = {**content, 'files': files, 'content_sha256': fingerprint(files | _part_hashes(out))}
    manifest['sha256'] = fingerprint(manifest)
    write_json(manifest, out / 'manifest.json')
    return manifest


def file_hashes(out: Path) -> dict[str, str]:
    """SHA-256 of the tokenizer's files and of every ``index.json``, which in turn holds the shards' hashes."""
    paths = [*out.glob('tokenizer/*'), *out.glob('train/**/index.json'), *out.glob('validation/**/index.json')]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def _part_hashes(out: Path) -> dict[str, str]:
    """SHA-256 of the index that each part of a domain had in version 0.1: equal data keep their ``content_sha256``."""
    hashes = {}
    for index in sorted(out.glob('train/*/index.json')):
        parts: dict[Path, list[Any]] = {}
        for shard in json.loads(index.read_text(encoding='utf-8'))['shards']:
            place = Path(shard['raw_data']['basename'])
            shard['raw_data']['basename'] = place.name
            parts.setdefault(place.parent, []).append(shard)
        for part, shards in parts.items():
            text = json.dumps({'version': 2, 'shards': shards}, sort_keys=True)
            name = (index.parent / part / 'index.json').relative_to(out).as_posix()
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    return hashes
