"""One unit of work: a file, or a part of one, turned into full rows and what is left over.

Units are cut by the input alone, and a unit's result depends on nothing but the unit and the recipe: whichever worker
does it, whenever and however often, it is the same. That is what makes a conversion deterministic and restartable.

Shape suffixes: R rows, S tokens of a row, N tokens.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from streaming import MDSWriter

from data_prep.durable import publish
from data_prep.input.formats import open_documents, splittable
from data_prep.input.reader import BadLine, Document
from data_prep.input.sources import SourceFile
from data_prep.split import text_hash
from data_prep.tokens.document_tokenizer import DocumentTokenizer

SHARD_BYTES = 64 << 20
# Text given to the tokenizer at once. Its result takes some thirty times as much memory.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Unit:
    """The documents that start at bytes ``start`` to ``end`` of a file (``end`` None: one that is read whole)."""

    domain: str
    number: int
    """Place among the domain's units, in the order of its files."""
    path: str
    start: int
    end: int | None
    bytes: int
    """Bytes as stored."""

    @property
    def name(self) -> str:
        """``domain/number``, also the unit's folder."""
        return f'{self.domain}/{self.number:05d}'


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to convert any unit."""

    source: Path
    units_folder: Path
    tokenizer_folder: Path
    seq_len: int
    bos_token_id: int
    eos_token_id: int
    thresholds: dict[str, int]
    max_bad_lines: int


@dataclass
class UnitRecord:
    """What came of a unit. Candidates are documents below the domain's validation threshold."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    rows: int = 0
    bad_lines: list[dict[str, int | str]] = field(default_factory=list)


@dataclass
class Loose:
    """Tokens of a unit that are not in its rows, and what decides where they go."""

    tail_N: np.ndarray
    """uint16, less than a row: the end of the unit's training tokens."""
    candidate_tokens_N: np.ndarray
    """uint16, the candidates' tokens, one document after the other."""
    candidate_lengths: np.ndarray
    """int64, tokens of each candidate."""
    candidate_bytes: np.ndarray
    """int64, bytes of each candidate's text."""
    candidate_hashes: np.ndarray
    """uint64"""
    near_hashes: np.ndarray
    """uint64, hashes of training documents that another domain's threshold would have made candidates."""


def plan_units(files: Sequence[SourceFile], unit_bytes: int) -> list[Unit]:
    """Cut files (sorted by domain and path) into units; files that can only be read whole are one unit each."""
    units: list[Unit] = []
    for file in files:
        part = unit_bytes if splittable(file.path) else max(file.bytes, 1)
        for start in range(0, file.bytes, part):
            number = units[-1].number + 1 if units and units[-1].domain == file.domain else 0
            size = min(part, file.bytes - start)
            end = start + size if splittable(file.path) else None
            units.append(Unit(file.domain, number, file.path, start, end, size))
    return units


def convert_unit(
    recipe: Recipe, unit: Unit, tokenizer: DocumentTokenizer, report: Callable[[int, int], None]
) -> UnitRecord:
    """Convert a unit into its folder, which appears at once and whole, and return its record.

    ``report`` is told bytes read and tokens made, as increments. Raises a ValueError if the unit alone has more bad
    lines than the whole run may have.
    """
    folder = recipe.units_folder / unit.name
    partial = folder.with_name(f'{folder.name}.{platform.node()}-{os.getpid()}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    record = UnitRecord()
    near_threshold = max(recipe.thresholds.values())
    threshold = recipe.thresholds[unit.domain]
    candidates: list[tuple[int, int, np.ndarray]] = []
    near_hashes: list[int] = []
    rows = RowWriter(partial / 'shards', recipe.seq_len)
    for documents, read_bytes in _batches(recipe, unit, record):
        tokens = 0
        train: list[np.ndarray] = []
        for document, ids in zip(documents, _token_ids(tokenizer, documents, recipe), strict=True):
            tokens += len(ids)
            hashed = text_hash(document.utf8)
            if hashed < threshold:
                candidates.append((hashed, len(document.utf8), ids))
                continue
            if hashed < near_threshold:
                near_hashes.append(hashed)
            train.append(ids)
            record.documents += 1
            record.text_bytes += len(document.utf8)
            record.tokens += len(ids)
        rows.write(train)
        report(read_bytes, tokens)
    loose = Loose(
        tail_N=rows.finish(),
        candidate_tokens_N=np.concatenate([ids for _, _, ids in candidates] or [np.empty(0, np.uint16)]),
        candidate_lengths=np.array([len(ids) for _, _, ids in candidates], np.int64),
        candidate_bytes=np.array([size for _, size, _ in candidates], np.int64),
        candidate_hashes=np.array([hashed for hashed, _, _ in candidates], np.uint64),
        near_hashes=np.array(near_hashes, np.uint64),
    )
    record.rows = rows.rows
    np.savez(partial / 'loose.npz', **vars(loose))
    (partial / 'record.json').write_text(json.dumps(asdict(record)))
    try:
        publish(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)  # another attempt at the same unit was first, with the same result
    return record


def read_record(folder: Path) -> UnitRecord | None:
    """The record of a finished unit, or None."""
    path = folder / 'record.json'
    return UnitRecord(**json.loads(path.read_text())) if path.is_file() else None


def read_loose(folder: Path) -> Loose:
    """The tokens of a finished unit that are not in its rows."""
    with np.load(folder / 'loose.npz') as arrays:
        return Loose(**{name: arrays[name] for name in arrays.files})


class RowWriter:
    """Packs tokens into rows of ``seq_len`` and writes them as MDS shards; the end that fills no row is handed back.

    The folder is made with the first row: where there is none, there are no shards.
    """

    def __init__(self, folder: Path, seq_len: int):
        self.folder = folder
        self.seq_len = seq_len
        self.rows = 0
        self._rest_N = np.empty(0, np.uint16)
        self._writer: MDSWriter | None = None

    def write(self, pieces: Iterable[np.ndarray]) -> None:
        """Add tokens (uint16) after those given before."""
        tokens_N = np.concatenate([self._rest_N, *pieces])
        count = len(tokens_N) // self.seq_len
        if count and self._writer is None:
            self._writer = MDSWriter(
                out=str(self.folder),
                columns={'tokens': f'ndarray:uint16:{self.seq_len}'},
                hashes=['xxh64'],
                size_limit=SHARD_BYTES,
            )
        for row_S in tokens_N[: count * self.seq_len].reshape(count, self.seq_len):
            self._writer.write({'tokens': row_S})  # type: ignore[union-attr]
        self.rows += count
        self._rest_N = tokens_N[count * self.seq_len :]

    def finish(self) -> np.ndarray:
        """Close the shards; returns the tokens that filled no row."""
        if self._writer is not None:
            self._writer.finish()
        return self._rest_N


def _batches(recipe: Recipe, unit: Unit, record: UnitRecord) -> Iterator[tuple[list[Document], int]]:
    """The unit's documents in batches, each with the bytes read for it; bad lines go to the record."""
    batch: list[Document] = []
    size = 0
    before = unit.start
    with open_documents(recipe.source / unit.path, unit.start, unit.end) as lines:
        for item in lines:
            if isinstance(item, BadLine):
                record.bad_lines.append({'file': unit.path, **asdict(item)})
                check_bad_lines(record.bad_lines, recipe.max_bad_lines)
                continue
            batch.append(item)
            size += len(item.utf8)
            if size >= _BATCH_BYTES:
                yield batch, lines.position - before
                before = lines.position
                batch, size = [], 0
        yield batch, unit.start + unit.bytes - before


def check_bad_lines(bad_lines: Sequence[dict[str, int | str]], limit: int) -> None:
    """Raise a ValueError that names the last bad line if there are more than the limit."""
    if len(bad_lines) > limit:
        last = bad_lines[-1]
        raise ValueError(
            f'more than {limit} bad lines; the last: {last["file"]}, line {last["line"]}: {last["reason"]}. '
            'Mend the file, or allow more with MAX_BAD_LINES and run the same command again'
        )


def _token_ids(tokenizer: DocumentTokenizer, documents: Sequence[Document], recipe: Recipe) -> Iterator[np.ndarray]:
    """uint16 ids of each document, between BOS and EOS."""
    for ids in tokenizer.ids([document.text for document in documents]):
        ids_N = np.empty(len(ids) + 2, np.uint16)
        ids_N[0], ids_N[1:-1], ids_N[-1] = recipe.bos_token_id, ids, recipe.eos_token_id
        yield ids_N
