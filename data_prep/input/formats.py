"""The one interface between file formats and the rest of the converter: ``open_documents`` by a file's suffix."""

from __future__ import annotations

from pathlib import Path

from data_prep.input.reader import Documents, JsonLines

_TABLES = ('.parquet', '.arrow')
# .json alone is left out: it is as often one value over many lines. Packed, it is how C4, Dolma and RedPajama-V2 name
# their JSON lines.
SUFFIXES = ('.jsonl', *(f'.{name}.{pack}' for name in ('jsonl', 'json') for pack in ('gz', 'zst', 'xz')), *_TABLES)
PATTERNS = ', '.join(f'*{suffix}' for suffix in SUFFIXES)
# What a complete file ends with, in formats where that is fixed.
END_MARKS = {'.parquet': b'PAR1', '.jsonl.xz': b'YZ', '.json.xz': b'YZ'}


def suffix_of(path: str) -> str | None:
    """The one of ``SUFFIXES`` that a path ends with, in small or capital letters; None for another."""
    return next((suffix for suffix in SUFFIXES if path.lower().endswith(suffix)), None)


def splittable(path: str) -> bool:
    """Whether reading may start in the middle of the file."""
    return suffix_of(path) in ('.jsonl', '.parquet')


def open_documents(path: Path, text_field: str, start: int = 0, end: int | None = None) -> Documents:
    """The documents of a file, or of the lines or row groups that start at bytes ``start`` to ``end`` of it.

    ``text_field`` is the field or column with the text. A file that is not splittable must be read as a whole.
    """
    suffix = suffix_of(path.name)
    if suffix not in _TABLES:
        return JsonLines(path, text_field, start, end)
    # Imports pyarrow, which takes a while and which a source of text files does without.
    from data_prep.input.tables import ArrowTable, ParquetTable

    return ParquetTable(path, text_field, start, end) if suffix == '.parquet' else ArrowTable(path, text_field)
