"""Token ratios as text, such as ``0.7/0.7/0.9``, and back. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any


def ratios_key(token_ratios: Iterable[float]) -> str:
    """``0.7/0.7/0.9``, the form in which ratios are written on a command line and in ``calibrated_thresholds``."""
    return '/'.join(f'{ratio:g}' for ratio in token_ratios)


def parse_ratios(text: str) -> list[float]:
    """The inverse of :func:`ratios_key`.

    Raises:
        ValueError: for anything else than numbers between slashes.
    """
    try:
        return [float(part) for part in text.split('/')]
    except ValueError:
        raise ValueError(f'token_ratios: {text!r} is not numbers between slashes, such as 0.7/0.7/0.9') from None


def as_ratios(key: str, value: Any) -> list[float]:
    """A list of numbers, or text such as ``0.7/0.7/0.9``, as a list of floats.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str):
        return parse_ratios(value)
    # True and False are no numbers.
    if not (isinstance(value, Sequence) and all(isinstance(v, Real) and not isinstance(v, bool) for v in value)):
        raise ValueError(f'{key}: {value!r} is not a list of numbers; set one per extra step')
    return [float(ratio) for ratio in value]
