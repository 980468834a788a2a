"""Folders and files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(out: Path, own: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into that becomes ``out``, in place of what is there, when the block ends without an error.

    Args:
        out: where it goes.
        own: whether a folder that is there is one of those that are written here, and may be replaced.

    Raises:
        ValueError: ``out`` is a file, the working directory or above it, or holds something else.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise ValueError(f'{out}: a file; name a folder')
    if Path.cwd().is_relative_to(out.resolve()):
        raise ValueError(f'{out}: the working directory is in it, and the whole folder would be replaced; name another')
    if out.is_dir() and any(out.iterdir()) and not own(out):
        raise ValueError(f'{out}: holds something else, which would be lost; name another folder')
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', suffix='.part', dir=out.parent))
    try:
        yield part
        part.chmod(0o755)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', suffix='.old', dir=out.parent))
            os.replace(out, old / out.name)
            os.replace(part, out)
            shutil.rmtree(old)
        else:
            os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_whole(text: str, out: Path) -> None:
    """Write a file, in place of what is there, as a whole or not at all; its folder is made if need be."""
    check_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f'{out.name}.partial')
    try:
        partial.write_text(text, encoding='utf-8')
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(out: Path) -> None:
    """Raise a ValueError where no file ``out`` can be written; to be asked before long work."""
    if not out.name or out.is_dir():
        raise ValueError(f'{out}: a folder; name a file')
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f'{out}: nothing can be written in {above}')
