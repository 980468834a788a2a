"""The last step, in one process and in the work items' order: remainders become sequences, shards get an index.

Every part may be repeated after a kill: what is in place stays, what is incomplete is made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.input.domains import too_short
from data_prep.work_item import Recipe, Remainder, SequenceWriter, WorkItem, read_record, read_remainder
from itt_composer.atomic import publish


@dataclass
class SplitCount:
    """What a domain's split holds. ``tokens`` is ``rows`` times the sequence length plus ``dropped_tokens``."""

    documents: int = 0
    bytes: int = 0
    """Bytes of text."""
    tokens: int = 0
    """With BOS and EOS."""
    rows: int = 0
    dropped_tokens: int = 0
    """The last partial sequence."""
    shard_bytes: int = 0


def finish_domain(
    recipe: Recipe, items: Sequence[WorkItem], out: Path, moved: np.ndarray
) -> tuple[SplitCount, SplitCount, list[dict[str, Any]]]:
    """Put a domain's work items together under ``out``; returns counts of training and validation, and the bad lines.

    ``moved`` are the hashes of candidates that some domain trains on (``trained_candidates``): they are
    training documents. Raises a ValueError if no training sequence results.
    """
    domain = items[0].domain
    train, validation = SplitCount(), SplitCount()
    train_folder, validation_folder = out / 'train' / domain, out / 'validation' / domain
    work = recipe.work_items_folder / domain
    train_rest = _fresh(work / 'rest.partial', recipe)
    validation_rows = _fresh(work / 'validation.partial', recipe)
    bad_lines: list[dict[str, Any]] = []
    for item in items:
        record = read_record(recipe.work_items_folder / item.name)
        assert record is not None
        bad_lines += record.bad_lines
        train.documents += record.documents
        train.bytes += record.text_bytes
        train.tokens += record.tokens
        train.rows += record.rows
        remainder = read_remainder(recipe.work_items_folder / item.name)
        train_rest.write([remainder.tail_N])
        for to_train, size, ids_N in _candidates(remainder, moved):
            count, rows = (train, train_rest) if to_train else (validation, validation_rows)
            count.documents += 1
            count.bytes += size
            count.tokens += len(ids_N)
            rows.write([ids_N])
    for count, rows in ((train, train_rest), (validation, validation_rows)):
        count.dropped_tokens = len(rows.finish())
        count.rows += rows.rows
    if train.rows == 0:
        raise ValueError(too_short(domain, f'{train.tokens} training tokens', recipe.seq_len))
    train_folder.mkdir(parents=True, exist_ok=True)
    indices: dict[str, Path] = {}
    for item in items:
        name = f'{item.number:05d}'
        _move(recipe.work_items_folder / item.name / 'shards', train_folder / name, indices)
    shutil.rmtree(train_folder / 'rest', ignore_errors=True)
    _move(train_rest.folder, train_folder / 'rest', indices)
    train.shard_bytes = _merge(indices, train_folder, work)
    shutil.rmtree(validation_folder, ignore_errors=True)
    if validation_rows.rows:
        validation_folder.parent.mkdir(parents=True, exist_ok=True)
        publish(validation_rows.folder, validation_folder)
        validation.shard_bytes = _shard_bytes(validation_folder)
    return train, validation, bad_lines


def trained_candidates(recipe: Recipe, items: Sequence[WorkItem]) -> np.ndarray:
    """Hashes of validation candidates whose text another domain, with a lower threshold, trains on.

    Holds the candidates' hashes in memory, eight bytes for each, and one work item's arrays.
    """
    folders = [recipe.work_items_folder / item.name for item in items]
    candidates = np.unique(np.concatenate([read_remainder(folder).candidate_hashes for folder in folders]))
    moved = [np.intersect1d(candidates, read_remainder(folder).near_hashes) for folder in folders]
    return np.unique(np.concatenate(moved))


def merge_validation(out: Path, work: Path) -> None:
    """One index over the validation sequences of all domains, in their parent folder, without copies."""
    indices = {index.parent.name: index for index in sorted((out / 'validation').glob('*/index.json'))}
    if indices:
        _merge(indices, out / 'validation', work)


def _fresh(folder: Path, recipe: Recipe) -> SequenceWriter:
    shutil.rmtree(folder, ignore_errors=True)
    return SequenceWriter(folder, recipe)


def _candidates(remainder: Remainder, moved: np.ndarray) -> Iterator[tuple[bool, int, np.ndarray]]:
    """Each candidate of a work item: whether it is for training after all, bytes of text, tokens."""
    to_train = np.isin(remainder.candidate_hashes, moved)
    ends = np.cumsum(remainder.candidate_lengths)
    for i, end in enumerate(ends):
        ids_N = remainder.candidate_tokens_N[end - remainder.candidate_lengths[i] : end]
        yield bool(to_train[i]), int(remainder.candidate_bytes[i]), ids_N


def _move(source: Path, target: Path, indices: dict[str, Path]) -> None:
    """Give a folder of shards its place, unless it is there already or there was nothing to write.

    Its index stays behind, and is added to ``indices``. Beside the merged one it would list the same shards twice:
    streaming's ``merge_index`` takes every index below a folder.
    """
    index = source.with_name(f'{source.name}.json')
    for folder in (source, target):
        if (folder / 'index.json').is_file():
            publish(folder / 'index.json', index)
    if source.is_dir():
        publish(source, target)
    if target.is_dir():
        indices[target.name] = index


def _merge(indices: dict[str, Path], folder: Path, work: Path) -> int:
    """One index over the shards of sub-folders, from the index of each, in their order; returns the shards' bytes.

    The same bytes as streaming's ``merge_index``, which reads its paths as URLs: it cuts them at ``#`` and ``?``, and
    of ``../data`` it keeps copies in the system's temporary folder, which it takes for the next conversion's.
    """
    shards = []
    for name, index in indices.items():
        for shard in json.loads(index.read_text(encoding='utf-8'))['shards']:
            for file in filter(None, (shard['raw_data'], shard['zip_data'])):
                file['basename'] = f'{name}/{file["basename"]}'
            shards.append(shard)
    work.mkdir(parents=True, exist_ok=True)
    merged = work / 'index.json'
    merged.write_text(json.dumps({'version': 2, 'shards': shards}), encoding='utf-8')
    publish(merged, folder / 'index.json')
    return sum(_shard_bytes(folder / name) for name in indices)


def _shard_bytes(folder: Path) -> int:
    return sum(shard.stat().st_size for shard in folder.glob('*.mds'))
