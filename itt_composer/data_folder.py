"""The folder that ``itt data --out <data>`` writes, and the checks of what lies in it.

::

    <data>/train/<domain>/index.json        and its MDS shards
    <data>/validation/<domain>/index.json   (a domain without validation documents has none)
    <data>/validation/index.json            the sequences of all domains, without copies of the shards
    <data>/manifest.json                    what they were made of; written last
    <data>/tokenizer/                       a Hugging Face tokenizer
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Tokenizer

from itt_composer.checks import read_json

_AGAIN = 'fetch it again, or make the data again'
_MANIFEST_KEYS = {'settings', 'tokenizer', 'versions', 'domains', 'source', 'bad_lines', 'files'}
_HASHES: dict[str, Callable[[bytes], Any]] = {
    'xxh64': xxhash.xxh64,
    'xxh3_64': xxhash.xxh3_64,
    'sha1': hashlib.sha1,
    'sha256': hashlib.sha256,
}


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, or of a part of it, without its key ``sha256``."""
    content = {key: value for key, value in manifest.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest id plus one; not the number of tokens, as a vocabulary may have holes."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of complete texts in a folder's ``tokenizer.json``.

    Raises:
        ValueError: the file is missing or incomplete.
    """
    file = folder / 'tokenizer.json'
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers' Rust raises bare ones
        raise ValueError(f'{file}: no tokenizer that can be loaded ({error}); {_AGAIN}') from None
    # transformers saves those that a tokenizer was last called with.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, int | None]]:
    """The tokenizer that ``itt data`` wrote, and its ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.

    Raises:
        ValueError: a file is missing or incomplete; names it.
    """
    tokenizer = read_tokenizer(folder)
    config = read_json(folder / 'tokenizer_config.json')
    if config is None:
        raise ValueError(f'{folder}/tokenizer_config.json: missing; {_AGAIN}')
    read_json(folder / 'special_tokens_map.json')  # transformers would read it, and not name it
    ids: dict[str, int | None] = {}
    for key in ('bos_token', 'eos_token', 'pad_token'):
        token = config.get(key)
        content = token['content'] if isinstance(token, dict) else token
        ids[f'{key}_id'] = None if content is None else tokenizer.token_to_id(content)
    return tokenizer, ids


def domains_in(folder: Path) -> list[str]:
    """The domains of ``<data>/train`` or ``<data>/validation``; a ValueError for one without its index."""
    folders = sorted(path for path in folder.glob('[!.]*') if path.is_dir())
    for path in folders:
        if not (path / 'index.json').is_file():
            raise ValueError(f'{path}/index.json: missing, and so is what the shards there hold; {_AGAIN}')
    return [path.name for path in folders]


def no_shards(place: Path | str, data: Path | str) -> str:
    """What to tell a user whose folder ``data`` lacks shards at ``place``."""
    return f'no shards at {place}; run: itt data --source <text> --out {data}, or set variables.data=<dir>'


def read_shards(folder: Path) -> list[dict[str, Any]]:
    """What the index of a folder says of each shard, after a check that each is there, at its size.

    Raises:
        ValueError: the index cannot be read, or a shard is missing or has another size; names the file.
    """
    index = folder / 'index.json'
    content = read_json(index)
    try:
        assert content is not None
        shards = content['shards']
        for shard in shards:
            int(shard['samples'])
            list(_files(folder, shard))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{index}: not an index of MDS shards ({type(error).__name__} {error}); {_AGAIN}') from None
    for shard in shards:
        # Of a compressed shard either form will do.
        found = [(path, size) for path, size, _ in _files(folder, shard)]
        existing = [(path, size) for path, size in found if path.is_file()]
        if not existing:
            raise ValueError(f'{found[0][0]}: missing, and {index} lists it; {_AGAIN}')
        for path, size in existing:
            if path.stat().st_size != size:
                raise ValueError(f'{path}: expected {size} bytes as {index} says, got {path.stat().st_size}; {_AGAIN}')
    return shards


def _files(folder: Path, shard: Mapping[str, Any]) -> Iterator[tuple[Path, int, Mapping[str, str]]]:
    """Path, bytes and hashes of a shard, and of its compressed form."""
    for file in (shard['raw_data'], shard.get('zip_data')):
        if file is not None:
            yield folder / file['basename'], int(file['bytes']), file.get('hashes') or {}


def read_manifest(data: Path) -> dict[str, Any] | None:
    """The manifest of a data folder, or None; a ValueError for a file that is no such manifest."""
    manifest = read_json(data / 'manifest.json')
    if manifest is not None and (missing := _MANIFEST_KEYS - manifest.keys()):
        raise ValueError(f'{data}/manifest.json: not a manifest of itt data, without {min(missing)}; {_AGAIN}')
    return manifest


def check_domains(data: Path, manifest: Mapping[str, Any], domains: Iterable[str]) -> None:
    """Raise a ValueError for one of the domains that has sequences by the manifest, and no folder."""
    for domain in domains:
        for split, counts in manifest['domains'].get(domain, {}).items():
            if split in ('train', 'validation') and counts['rows'] and not (data / split / domain).is_dir():
                raise ValueError(
                    f'{data}/{split}/{domain}: missing, and {data}/manifest.json lists {counts["rows"]} sequences '
                    f'there; {_AGAIN}'
                )


def check_unchanged(data: Path, manifest: Mapping[str, Any]) -> None:
    """Raise a ValueError for an index or a ``tokenizer.json`` that is not the one that the manifest has the hash of."""
    for name, expected in manifest['files'].items():
        path = data / name
        if path.name in ('index.json', 'tokenizer.json') and path.is_file() and _sha256(path) != expected:
            raise ValueError(f'{path}: changed since {data}/manifest.json was written; {_AGAIN}')


def check_hashes(folder: Path, most_bytes: int) -> int:
    """Compare the shards of a folder with the hashes in its index, up to ``most_bytes`` of them.

    Returns:
        How many bytes are left of ``most_bytes``.

    Raises:
        ValueError: a shard has changed; names it.
    """
    for shard in read_shards(folder):
        for path, size, hashes in _files(folder, shard):
            if not path.is_file():
                continue
            most_bytes -= size
            if most_bytes < 0:
                return 0
            data = path.read_bytes()
            if any(_HASHES[name](data).hexdigest() != hashes[name] for name in hashes if name in _HASHES):
                raise ValueError(f'{path}: changed since {folder}/index.json was written; {_AGAIN}')
    return most_bytes


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
