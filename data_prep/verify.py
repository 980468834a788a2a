"""``itt verify-data``: is a converted folder what its manifest says, and fit to train on?

Reads every byte: hashes, then sequences, then the documents in them. Shape suffixes: S tokens of a sequence, N tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import xxhash
from rich.console import Console

from data_prep.cpus import usable_cpus
from data_prep.manifest import file_hashes
from itt_composer.checks import read_json
from itt_composer.data_folder import fingerprint

SPLITS = ('validation', 'train')


@dataclass(frozen=True)
class Part:
    """Shards whose sequences lie end to end: those of one work item."""

    folder: Path
    """``out/split/domain``"""
    shards: tuple[dict[str, Any], ...]
    """Each as its index has it."""


def main(
    out: Annotated[Path, typer.Option(help='Folder that `itt data` wrote.')] = Path('data'),
    workers: Annotated[
        int | None, typer.Option(help='Processes; by default one per CPU that this process may use.')
    ] = None,
) -> None:
    """Check a converted folder, and write OUT/samples.html, a page of decoded sequences."""
    try:
        counts = verify(out, workers)
        from data_prep.samples_page import write_page

        page = write_page(out)
    except (ValueError, OSError) as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from error
    Console().print(
        f'{out}: {sum(counts.values()):,} sequences of {len(counts)} sets are as the manifest says, and no validation '
        f'document is trained on. {page} shows some of them.',
        markup=False,
    )


def verify(out: Path, workers: int | None = None) -> dict[tuple[str, str], int]:
    """Sequences of each split and domain; raises a ValueError that names the first thing that is not as it should be.

    Holds the hashes of the validation documents in memory, and one part's sequences per process.
    """
    if workers is not None and workers < 1:
        raise ValueError(f'--workers: expected at least 1, got {workers}')
    manifest = _checked_manifest(out)
    import streaming  # noqa: F401 (takes long, so after the check, and before the forks, which then have it)

    rows: dict[tuple[str, str], int] = {}
    held_out = np.empty(0, np.uint64)
    # A fork has the imports already; where it is not safe (macOS), the default start method imports them again.
    context = get_context('fork' if sys.platform == 'linux' else None)
    with ProcessPoolExecutor(workers or usable_cpus(), context) as pool:
        for split in SPLITS:
            parts = [part for domain in manifest['domains'] for part in _parts(out / split / domain)]
            check = partial(_check_part, seq_len=manifest['settings']['seq_len'], tokenizer=manifest['tokenizer'])
            rows |= {(split, domain): 0 for domain in manifest['domains']}
            documents = [held_out]
            for part, (count, found) in zip(parts, pool.map(check, parts), strict=True):
                rows[split, part.folder.name] += count
                if split == 'train' and (both := np.intersect1d(held_out, found)).size:
                    raise ValueError(f'{part.folder}: {both.size} validation documents are also trained on')
                documents += [found] if split == 'validation' else []
            held_out = np.unique(np.concatenate(documents))
    for (split, domain), count in rows.items():
        _check_counts(manifest, split, domain, count)
    return rows


def _checked_manifest(out: Path) -> dict[str, Any]:
    manifest = read_json(out / 'manifest.json')
    if manifest is None:
        raise ValueError(f'--out: {out} has no manifest.json: it is no finished conversion; run: itt data --out {out}')
    if fingerprint(manifest) != manifest.get('sha256'):
        raise ValueError(f'{out / "manifest.json"} was changed since it was written; convert into a new folder')
    there = file_hashes(out)
    for path in sorted(manifest['files'].keys() | there.keys()):
        if manifest['files'].get(path) != there.get(path):
            raise ValueError(f'{out / path} is not the file that the conversion wrote; convert into a new folder')
    return manifest


def _parts(folder: Path) -> Iterator[Part]:
    index = read_json(folder / 'index.json')
    shards = index['shards'] if index else []
    for _, group in groupby(shards, key=lambda shard: Path(shard['raw_data']['basename']).parent):
        yield Part(folder, tuple(group))


def _check_part(part: Part, seq_len: int, tokenizer: dict[str, Any]) -> tuple[int, np.ndarray]:
    """Sequences of a part, and uint64 hashes of the documents that lie completely in it."""
    from streaming.base.format import reader_from_json
    from streaming.base.hashing import get_hash

    rows = []
    for shard in part.shards:
        raw = shard['raw_data']
        path = part.folder / raw['basename']
        data = path.read_bytes()
        if len(data) != raw['bytes']:
            raise ValueError(f'{path} has {len(data)} bytes, and its index says {raw["bytes"]}')
        for algorithm, expected in raw['hashes'].items():
            if get_hash(algorithm, data) != expected:
                raise ValueError(f'{path} is damaged: its {algorithm} is not the one in its index')
        del data
        reader = reader_from_json(str(part.folder), '', shard)
        for i in range(reader.samples):
            row_S = reader[i]['tokens']
            if row_S.shape != (seq_len,):
                raise ValueError(f'{path}: sequence {i} has shape {row_S.shape}, not ({seq_len},)')
            if row_S.max() >= tokenizer['vocab_size']:
                raise ValueError(
                    f'{path}: sequence {i} has token {row_S.max()}, outside the vocabulary of {tokenizer["vocab_size"]}'
                )
            rows.append(row_S)
    tokens_N = np.concatenate(rows) if rows else np.empty(0, np.uint16)
    return len(rows), document_hashes(tokens_N, tokenizer['bos_token_id'], tokenizer['eos_token_id'])


def document_hashes(tokens_N: np.ndarray, bos: int, eos: int) -> np.ndarray:
    """uint64 hashes of the complete documents, from BOS to EOS, in tokens laid end to end.

    Works too where BOS and EOS are one id.
    """
    first = tokens_N == bos
    # A document starts where tokens do, or after another's end.
    first[1:] &= tokens_N[:-1] == eos
    starts, ends = np.flatnonzero(first), np.flatnonzero(tokens_N == eos)
    next_end = np.searchsorted(ends, starts, 'right')
    whole = next_end < len(ends)
    pairs = zip(starts[whole], ends[next_end[whole]], strict=True)
    return np.array([xxhash.xxh3_64_intdigest(tokens_N[a : b + 1].tobytes()) for a, b in pairs], np.uint64)


def _check_counts(manifest: dict[str, Any], split: str, domain: str, rows: int) -> None:
    said = manifest['domains'][domain][split]
    tokens = rows * manifest['settings']['seq_len'] + said['dropped_tokens']
    for key, name, value in (('rows', 'sequences', rows), ('tokens', 'tokens', tokens)):
        if value != said[key]:
            raise ValueError(f'{split}/{domain} holds {value} {name}, and the manifest says {said[key]}')
