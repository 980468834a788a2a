"""One work item: a file, or a part of one, turned into full sequences and a remainder.

Work items are cut by the input alone, and a work item's result depends on nothing but the work item and the recipe. So
it is the same whichever worker does it, and however often: that makes a conversion deterministic and restartable.

Shape suffixes: S tokens of a sequence, N tokens.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from streaming import MDSWriter

from data_prep.input.formats import open_documents, splittable
from data_prep.input.reader import BadLine, Document
from data_prep.input.sources import SourceFile
from data_prep.split import text_hash
from data_prep.tokens.document_tokenizer import DocumentTokenizer
from itt_composer.atomic import publish

SHARD_BYTES = 64 << 20
# Text per call of the tokenizer. Its result takes some thirty times as much memory.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class WorkItem:
    """The documents that start at bytes ``start`` to ``end`` of a file (``end`` None: one that cannot be split)."""

    domain: str
    number: int
    """Place among the domain's work items, in the order of its files."""
    path: str
    start: int
    end: int | None
    bytes: int
    """Bytes as stored."""

    @property
    def name(self) -> str:
        """``domain/number``, also the work item's folder."""
        return f'{self.domain}/{self.number:05d}'


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to convert any work item."""

    source: Path
    work_items_folder: Path
    tokenizer_folder: Path
    seq_len: int
    bos_token_id: int
    eos_token_id: int
    thresholds: dict[str, int]
    max_bad_lines: int
    text_field: str
    token_dtype: str
    """``uint16`` or ``uint32``."""


@dataclass
class WorkItemRecord:
    """What came of a work item. Candidates are documents below the domain's validation threshold."""

    lines: int = 0
    """All that was read: documents, candidates, empty documents and bad lines."""
    documents: int = 0
    """Training documents."""
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    rows: int = 0
    bad_lines: list[dict[str, int | str]] = field(default_factory=list)


@dataclass
class Remainder:
    """Tokens of a work item that are not in its sequences, and what decides where they go."""

    tail_N: np.ndarray
    """Less than a sequence: the end of the work item's training tokens."""
    candidate_tokens_N: np.ndarray
    """The candidates' tokens, one document after the other."""
    candidate_lengths: np.ndarray
    """int64, tokens of each candidate."""
    candidate_bytes: np.ndarray
    """int64, bytes of each candidate's text."""
    candidate_hashes: np.ndarray
    """uint64"""
    near_hashes: np.ndarray
    """uint64, hashes of training documents that another domain's threshold would have made candidates."""


def plan_work_items(files: Sequence[SourceFile], work_item_bytes: int) -> list[WorkItem]:
    """Cut files (sorted by domain and path) into work items; a file that cannot be split is one work item."""
    items: list[WorkItem] = []
    for file in files:
        part = work_item_bytes if splittable(file.path) else max(file.bytes, 1)
        for start in range(0, file.bytes, part):
            number = items[-1].number + 1 if items and items[-1].domain == file.domain else 0
            size = min(part, file.bytes - start)
            end = start + size if splittable(file.path) else None
            items.append(WorkItem(file.domain, number, file.path, start, end, size))
    return items


def convert_work_item(
    recipe: Recipe, item: WorkItem, tokenizer: DocumentTokenizer, report: Callable[[int, int], None]
) -> WorkItemRecord:
    """Convert a work item into its folder, which appears complete or not at all, and return its record.

    ``report`` is told bytes read and tokens made, as increments. Raises a ValueError if the work item alone has more
    bad lines than the conversion may have.
    """
    folder = recipe.work_items_folder / item.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = f'{folder.name}.{platform.node()}-{os.getpid()}.'
    partial = Path(tempfile.mkdtemp(prefix=name, suffix='.partial', dir=folder.parent))
    record = WorkItemRecord()
    near_threshold = max(recipe.thresholds.values())
    threshold = recipe.thresholds[item.domain]
    candidates: list[tuple[int, int, np.ndarray]] = []
    near_hashes: list[int] = []
    rows = SequenceWriter(partial / 'shards', recipe)
    for documents, read_bytes in _batches(recipe, item, record):
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
    remainder = Remainder(
        tail_N=rows.finish(),
        candidate_tokens_N=np.concatenate([ids for _, _, ids in candidates] or [np.empty(0, recipe.token_dtype)]),
        candidate_lengths=np.array([len(ids) for _, _, ids in candidates], np.int64),
        candidate_bytes=np.array([size for _, size, _ in candidates], np.int64),
        candidate_hashes=np.array([hashed for hashed, _, _ in candidates], np.uint64),
        near_hashes=np.array(near_hashes, np.uint64),
    )
    record.rows = rows.rows
    np.savez(partial / 'remainder.npz', **vars(remainder))
    (partial / 'record.json').write_text(json.dumps(asdict(record)))
    try:
        publish(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)  # another attempt at the same work item was first, with the same result
    return record


def read_record(folder: Path) -> WorkItemRecord | None:
    """The record of a finished work item, or None."""
    path = folder / 'record.json'
    return WorkItemRecord(**json.loads(path.read_text())) if path.is_file() else None


def read_remainder(folder: Path) -> Remainder:
    """The tokens of a finished work item that are not in its sequences."""
    with np.load(folder / 'remainder.npz') as arrays:
        return Remainder(**{name: arrays[name] for name in arrays.files})


class SequenceWriter:
    """Packs tokens into sequences of the recipe's length and writes them as MDS shards; returns the remainder.

    The folder is made with the first sequence.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder = folder
        self.seq_len = recipe.seq_len
        self.rows = 0
        self._encoding = f'ndarray:{recipe.token_dtype}:{recipe.seq_len}'
        self._rest_N = np.empty(0, recipe.token_dtype)
        self._writer: MDSWriter | None = None

    def write(self, pieces: Iterable[np.ndarray]) -> None:
        """Add tokens after those of earlier calls."""
        tokens_N = np.concatenate([self._rest_N, *pieces])
        count = len(tokens_N) // self.seq_len
        if count and self._writer is None:
            self._writer = MDSWriter(
                out=str(self.folder),
                columns={'tokens': self._encoding},
                hashes=['xxh64'],
                size_limit=SHARD_BYTES,
            )
        for row_S in tokens_N[: count * self.seq_len].reshape(count, self.seq_len):
            self._writer.write({'tokens': row_S})  # type: ignore[union-attr]
        self.rows += count
        self._rest_N = tokens_N[count * self.seq_len :]

    def finish(self) -> np.ndarray:
        """Close the shards; returns the tokens that filled no sequence."""
        if self._writer is not None:
            self._writer.finish()
        return self._rest_N


def _batches(recipe: Recipe, item: WorkItem, record: WorkItemRecord) -> Iterator[tuple[list[Document], int]]:
    """The work item's documents in batches, each with the bytes read for it; bad lines go to the record."""
    batch: list[Document] = []
    size = 0
    before = item.start
    with open_documents(recipe.source / item.path, recipe.text_field, item.start, item.end) as lines:
        for line in lines:
            record.lines += 1
            if isinstance(line, BadLine):
                record.bad_lines.append({'file': item.path, **asdict(line)})
                check_bad_lines(record.bad_lines, recipe.max_bad_lines)
                continue
            if not line.text:
                record.empty_documents += 1
                continue
            batch.append(line)
            size += len(line.utf8)
            if size >= _BATCH_BYTES:
                yield batch, lines.position - before
                before = lines.position
                batch, size = [], 0
        yield batch, item.start + item.bytes - before


def check_bad_lines(bad_lines: Sequence[dict[str, int | str]], limit: int) -> None:
    """Raise a ValueError that names the last bad line if there are more than the limit."""
    if len(bad_lines) > limit:
        last = bad_lines[-1]
        raise ValueError(
            f'more than {limit} bad lines; the last: {last["file"]}, line {last["line"]}: {last["reason"]}. '
            'Fix the file, or pass a larger --max-bad-lines; the same command continues'
        )


def _token_ids(tokenizer: DocumentTokenizer, documents: Sequence[Document], recipe: Recipe) -> Iterator[np.ndarray]:
    """Ids of each document, between BOS and EOS."""
    for ids in tokenizer.ids([document.text for document in documents]):
        ids_N = np.empty(len(ids) + 2, recipe.token_dtype)
        ids_N[0], ids_N[1:-1], ids_N[-1] = recipe.bos_token_id, ids, recipe.eos_token_id
        yield ids_N
