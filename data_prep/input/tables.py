"""Documents out of a text column of a table, one at a time: Parquet files, and Arrow files of Hugging Face.

Tables are read a few rows at a time; what is held in memory is the pages that these rows lie in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import ipc, parquet

from data_prep.input.reader import BadLine, Document, Documents, missing_field

_BATCH_ROWS = 64
_TEXT_TYPES = (
    *(pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view),
    *(pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view),
)


class ParquetTable(Documents):
    """The documents of the row groups that start at bytes ``start`` to ``end`` of a Parquet file.

    Raises a ValueError that names the file if it is no Parquet file, has no such column of text, or is damaged.
    """

    def __init__(self, path: Path, text_field: str, start: int = 0, end: int | None = None):
        self.path = path
        self.text_field = text_field
        self._position = start
        try:
            self._file = parquet.ParquetFile(path, page_checksum_verification=True)
        except pyarrow.ArrowException as error:
            raise _damaged(path, error) from error
        _check_column(path, self._file.schema_arrow, text_field)
        # Row groups and not bytes are what can be read; they belong to the part that they start in. The first one
        # starts a few bytes into the file.
        starts = [_group_start(self._file.metadata.row_group(i)) for i in range(self._file.num_row_groups)]
        self._groups = [i for i, at in enumerate(starts) if start <= at and (end is None or at < end)]

    @property
    def position(self) -> int:
        """Bytes up to the end of the rows read."""
        return self._position

    def __iter__(self) -> Iterator[Document | BadLine]:
        metadata = self._file.metadata
        for group in self._groups:
            row = sum(metadata.row_group(i).num_rows for i in range(group))
            about = metadata.row_group(group)
            start, size = (
                _group_start(about),
                sum(about.column(i).total_compressed_size for i in range(about.num_columns)),
            )
            done = 0
            # No threads of Arrow's own: one process is one core.
            batches = self._file.iter_batches(_BATCH_ROWS, [group], columns=[self.text_field], use_threads=False)
            try:
                for batch in batches:
                    done += len(batch)
                    self._position = start + size * done // about.num_rows
                    yield from _documents(batch.column(0), row)
                    row += len(batch)
            except (pyarrow.ArrowException, OSError) as error:
                raise _damaged(self.path, error) from error


class ArrowTable(Documents):
    """The documents of an Arrow stream file, as Hugging Face's ``datasets`` stores them; read as a whole.

    Raises a ValueError that names the file if it is no Arrow stream, has no such column of text, or is damaged.
    """

    def __init__(self, path: Path, text_field: str):
        self.path = path
        self.text_field = text_field
        self._file = pyarrow.OSFile(str(path))
        try:
            self._batches = ipc.open_stream(self._file)
        except pyarrow.ArrowException as error:
            raise _damaged(path, error) from error
        _check_column(path, self._batches.schema, text_field)

    def __iter__(self) -> Iterator[Document | BadLine]:
        row = 0
        try:
            for batch in self._batches:
                yield from _documents(batch.column(self.text_field), row)
                row += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from error


def _group_start(group: parquet.RowGroupMetaData) -> int:
    first = group.column(0)
    return min(first.data_page_offset, first.dictionary_page_offset or first.data_page_offset)


def _check_column(path: Path, schema: pyarrow.Schema, text_field: str) -> None:
    count = schema.names.count(text_field)
    if count == 0:
        raise ValueError(f'{path}: {missing_field(text_field, schema.names)}')
    if count > 1:
        raise ValueError(f'{path}: {count} columns are called {text_field!r}; keep one of them')
    kind = schema.field(text_field).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(is_kind(values) for is_kind in _TEXT_TYPES):
        raise ValueError(f'{path}: column {text_field} is {kind}, not string')


def _documents(column: pyarrow.Array, before: int) -> Iterator[Document | BadLine]:
    """Each value of a column; ``before`` is the number of rows in front of it."""
    for row, value in enumerate(column, before + 1):
        try:
            text = value.as_py()
            if isinstance(text, bytes):
                text = text.decode()
        except UnicodeDecodeError as error:
            yield BadLine(row, f'invalid UTF-8: {error.reason} at byte {error.start}')
            continue
        yield BadLine(row, 'text is null') if text is None else Document(text, text.encode())


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f'{path}: cut off or damaged ({error}); fetch the file again or remove it')
