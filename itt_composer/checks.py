"""Checks of values from outside, each a ValueError of one line that names the key. Standard library only."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def check_choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise a ValueError that lists the allowed values, and the nearest one, if ``value`` is not among them."""
    if value in allowed:
        return
    raise ValueError(f'{key}: {value!r} is not one of {", ".join(allowed)}{did_you_mean(value, allowed)}')


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise a ValueError that names the first unknown key and the nearest known one."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            raise ValueError(f'{where}: unknown key {key!r}{did_you_mean(key, known)}')


def check_mapping(key: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a mapping, or None."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f'{key}: {value!r} is not a mapping of keys to values')


def did_you_mean(value: Any, known: Sequence[str]) -> str:
    """``'; did you mean ...?'`` with the nearest known name, or an empty string where none is near."""
    nearest = difflib.get_close_matches(str(value), known, n=1)
    return f'; did you mean {nearest[0]!r}?' if nearest else ''


def is_list_of(value: Any, kind: type) -> bool:
    """Whether ``value`` is a list of numbers of a kind, Integral or Real; True and False are no numbers."""
    return isinstance(value, Sequence) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of JSON, or None if there is no file.

    Raises:
        ValueError: something else is in the file, or it is incomplete.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path}: not a JSON file ({error})') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected a JSON object, got {type(content).__name__}')
    return content
