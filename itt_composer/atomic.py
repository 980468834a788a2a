"""Files and folders that appear completely or not at all, also where the process or the machine dies.

Everything is written into a folder of an unpredictable name beside its place, synced to the disk, and renamed. Modes
follow the umask. A killed process leaves that folder behind: ``remove_leftovers`` takes it away.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(text: str, out: Path) -> None:
    """Write a file in place of what is there; its folder is made if need be.

    Raises:
        ValueError: ``out`` is a folder, or nothing can be written there.
    """
    write_bytes(text.encode(), out)


def write_bytes(content: bytes, out: Path) -> None:
    """Write a file, as :func:`write_text` does."""
    check_writable(out)
    with _scratch(out) as scratch:
        partial = scratch / out.name
        partial.write_bytes(content)
        publish(partial, out)


def write_json(content: Mapping[str, Any], out: Path) -> None:
    """Write a file of JSON, as :func:`write_text` does."""
    write_text(json.dumps(content, indent=2) + '\n', out)


@contextmanager
def atomic_folder(out: Path, own: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a folder to write into; it becomes ``out``, in place of what is there, if the block ends without an error.

    Args:
        out: the place.
        own: whether a folder that is there is one of those that are written here, and may be replaced.

    Raises:
        ValueError: ``out`` is a file, the working directory or above it, or holds something else.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise ValueError(f'{out}: a file; name a folder')
    if Path.cwd().is_relative_to(out.resolve()):
        raise ValueError(f'{out}: the working directory is in it, and the folder would be replaced; name another')
    if out.is_dir() and any(out.iterdir()) and not own(out):
        raise ValueError(f'{out}: holds something else, which would be lost; name another folder')
    with _scratch(out) as scratch:
        partial = scratch / out.name
        partial.mkdir()
        yield partial
        publish(partial, out, scratch / 'old')


def publish(partial: Path, path: Path, old: Path | None = None) -> None:
    """Give a finished file or folder its name, once its content is on the disk.

    A file takes the place of one of that name. A folder of that name is moved to ``old``, and back if that fails.
    """
    # What is there stays in its place meanwhile: for large weights this takes minutes.
    if partial.is_dir():
        for parent, _, names in os.walk(partial):
            for name in names:
                _sync(os.path.join(parent, name))
            _sync(parent)
    else:
        _sync(partial)
    try:
        if old is not None and path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        if old is not None and old.exists() and not path.exists():
            os.replace(old, path)
    _sync(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; nobody else may be writing there."""
    for leftover in folder.glob('.*.part'):
        shutil.rmtree(leftover, ignore_errors=True)


def check_writable(out: Path) -> None:
    """Raise a ValueError if no file ``out`` can be written; to be called before long work."""
    if not out.name or out.is_dir():
        raise ValueError(f'{out}: a folder; name a file')
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f'{out}: nothing can be written in {above}')


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Yield a private folder beside ``out``, on the same file system. What is made in it has the umask's modes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f'.{out.name[:64]}.', suffix='.part', dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
