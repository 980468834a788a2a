"""Documents out of a file, one at a time; here out of JSON lines.

A file is read as a stream; what is held in memory is one line and the decompressor's buffers.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_COUNT_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 18
# Names of fields that a message shows at most.
_FIELDS = 10


@dataclass(frozen=True)
class Document:
    """One document: its text and the same text as UTF-8."""

    text: str
    utf8: bytes


@dataclass(frozen=True)
class BadLine:
    """A line of a text file, or a row of a table, that holds no document."""

    line: int
    """Counted from 1."""
    reason: str


class Documents(AbstractContextManager['Documents']):
    """An open file, iterated once: a Document or a BadLine each.

    Raises a ValueError that names the file if its data are cut off or damaged.
    """

    _file: Any

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def position(self) -> int:
        """Bytes of the file read so far, as stored (compressed or not)."""
        return self._file.tell()

    @abstractmethod
    def __iter__(self) -> Iterator[Document | BadLine]: ...


class JsonLines(Documents):
    """The documents of a JSON-lines file, or of the lines that start at bytes ``start`` to ``end`` of it.

    Iterating yields a Document or a BadLine for each line that is not blank. A compressed file has no parts.
    Raises a ValueError that names file and line if compressed data are cut off or damaged.
    """

    def __init__(self, path: Path, text_field: str, start: int = 0, end: int | None = None):
        self.path = path
        self.text_field = text_field
        self.start = start
        self.end = end
        self._file: BinaryIO = open(path, 'rb')  # noqa: SIM115 (closed by __exit__)
        self._lines, self._damage = _decompressed(self._file, path.name.lower())

    def __iter__(self) -> Iterator[Document | BadLine]:
        if self.start > 0:
            # The line that the previous part ends with is that part's, also where it ends exactly at start.
            self._file.seek(self.start - 1)
            self._file.readline()
        number = 0
        first = self._file.tell()
        while self.end is None or self._file.tell() < self.end:
            try:
                line = self._lines.readline()
            except self._damage as error:
                raise ValueError(
                    f'{self.path}: compressed data are cut off or damaged after line {number} ({error}); '
                    'fetch the file again or remove it'
                ) from error
            if not line:
                return
            number += 1
            if line.isspace():
                continue
            parsed = _parse(line, self.text_field)
            del line  # a long one is not held while its document is worked on
            yield parsed if isinstance(parsed, Document) else BadLine(self._lines_before(first) + number, parsed)

    def _lines_before(self, offset: int) -> int:
        """Lines in front of a byte offset, counted only when a bad line in a part of a file must be named."""
        count = 0
        with open(self.path, 'rb') as file:
            while offset > 0 and (data := file.read(min(offset, _COUNT_BYTES))):
                count += data.count(b'\n')
                offset -= len(data)
        return count


def _decompressed(raw: BinaryIO, name: str) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """The stream of a file's lines, and what it raises where compressed data are damaged or end too early."""
    if name.endswith('.gz'):
        return gzip.GzipFile(fileobj=raw), (EOFError, zlib.error, gzip.BadGzipFile)  # type: ignore[return-value]
    if name.endswith('.xz'):
        return lzma.LZMAFile(raw), (EOFError, lzma.LZMAError)  # type: ignore[return-value]
    if name.endswith('.zst'):
        import pyarrow  # takes a while, and most sources have no such files

        # Arrow's stream says where the last frame is cut off; the one of zstandard ends there without a word.
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, 'zstd'), _BUFFER_BYTES), (OSError,)
    return raw, ()


def _parse(line: bytes, text_field: str) -> Document | str:
    """The document in a line, or why there is none."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return f'invalid UTF-8: {error.reason} at byte {error.start}'
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: a number may have too many digits
        return f'not JSON: {error}'
    if not isinstance(record, dict):
        return f'not an object with fields, but {type(record).__name__}'
    if text_field not in record:
        return missing_field(text_field, record)
    text = record[text_field]
    if not isinstance(text, str):
        return f'{text_field} is {type(text).__name__}, not a string'
    try:
        return Document(text, text.encode())
    except UnicodeEncodeError as error:
        return f'{text_field} is not Unicode: {error.reason}'


def missing_field(text_field: str, fields: Iterable[str]) -> str:
    """What to tell a user whose text is in another field or column."""
    there = ', '.join(itertools.islice(fields, _FIELDS)) or 'none'
    return f'no text field {text_field!r}; the fields are {there}; name the one with the text: --text-field'
