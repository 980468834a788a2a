"""A section of a training config against the arguments of what is built of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from itt_composer.checks import check_keys, check_time, check_value
from itt_composer.config import limits
from itt_composer.config.signatures import Signature

Settings = Mapping[str, Any]


def with_where(where: str, check: Any, *arguments: Any, **keywords: Any) -> None:
    """Run a check whose message starts with the key, and put the place of the key before it."""
    try:
        check(*arguments, **keywords)
    except ValueError as error:
        raise ValueError(f'{where}{error}') from None


def check_arguments(
    values: Settings, known: Signature, where: str, given: Iterable[str] = (), more: Iterable[str] = ()
) -> None:
    """Check names, types and limits of what a function or class will be called with.

    Args:
        values: the keys of a section.
        known: arguments that there are.
        where: the section, for messages.
        given: arguments that foundry sets itself and nobody else may.
        more: other keys that may be set.

    Raises:
        ValueError: one line that names the key.
    """
    names = [name for name in known.parameters if name not in given]
    if not known.open:
        check_keys((str(key) for key in values), [*names, *more], where)
    for key, value in values.items():
        parameter = known.parameters.get(key)
        if parameter is None or (value is None and (parameter.none_by_default or key in limits.MAY_BE_NULL)):
            continue
        # A path of a key that is written out: ``optimizer.lr`` of ``itt.yaml: optimizer``.
        within = f'{re.split(r"[ .]", where)[-1]}.{key}'
        bounds = limits.LIMITS.get(within) or limits.LIMITS.get(key) or {}
        if re.search(r'\bTime\b', parameter.annotation) and not (
            isinstance(value, int) and re.search(r'\bint\b', parameter.annotation)
        ):
            check_time(f'{where}.{key}', value, limits.TRAINER_UNITS, zero=key in limits.MAY_BE_ZERO)
        else:
            check_value(f'{where}.{key}', value, parameter.annotation, **bounds)
