"""Files and folders that appear at once and whole, and are on the disk when they do, also where the machine fails."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def publish(partial: Path, path: Path) -> None:
    """Give a finished file or folder its name, once its content is on the disk.

    A file takes the place of one of that name; for a folder there must be none.
    """
    if partial.is_dir():
        for parent, _, names in os.walk(partial):
            for name in names:
                _sync(os.path.join(parent, name))
            _sync(parent)
    else:
        _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of JSON."""
    partial = path.with_name(path.name + '.partial')
    partial.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    publish(partial, path)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
