"""The one interface between file formats and the rest of the converter: ``open_documents`` by a file's suffix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

from data_prep.input.reader import BadLine, Document, JsonLines

SUFFIXES = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet', '.arrow')


class Documents(Protocol):
    """An open file, iterated once. Raises a ValueError that names the file where its data are cut off or damaged."""

    @property
    def position(self) -> int:
        """Bytes of the file read so far, as stored (compressed or not)."""

    def __enter__(self) -> Documents: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[Document | BadLine]: ...


def splittable(path: str) -> bool:
    """Whether reading may start in the middle of the file."""
    return path.endswith(('.jsonl', '.parquet'))


def open_documents(path: Path, start: int = 0, end: int | None = None) -> Documents:
    """The documents of a file, or of the lines or row groups that start at bytes ``start`` to ``end`` of it.

    A file that is not splittable must be read whole.
    """
    if not path.name.endswith(('.parquet', '.arrow')):
        return JsonLines(path, start, end)
    # Imports pyarrow, which takes a while and which a source of text files does without.
    from data_prep.input.tables import ArrowTable, ParquetTable

    return ParquetTable(path, start, end) if path.name.endswith('.parquet') else ArrowTable(path)
