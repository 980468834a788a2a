"""Old names of model options and config groups, read with a warning for one release. Standard library only."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

RENAMED_KEYS = {'growth_init': 'residual_scale_init'}
RENAMED_VALUES = {
    ('thinking', 'growth'): 'residual_scale',
    ('thinking_kv', 'chosen'): 'routed_only',
    ('reweighting', 'chosen'): 'routed_only',
}
RENAMED_GROUPS = {('family', 'growth'): 'residual_scale'}


def current_names(model: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a model under current keys and values, from a training config, checkpoint or ``config.json``."""
    current: dict[str, Any] = {}
    for key, value in model.items():
        if key in RENAMED_KEYS:
            warn_renamed(f'model.{key} is now model.{RENAMED_KEYS[key]}')
        new_value = RENAMED_VALUES.get((key, value)) if isinstance(value, str) else None
        if new_value:
            warn_renamed(f'model.{key}: {value!r} is now {new_value!r}')
        current[RENAMED_KEYS.get(key, key)] = new_value or value
    return current


def current_groups(parts: Mapping[str, Any]) -> dict[str, Any]:
    """``parts`` of a training config, kind to name or list of names, with the config groups' names of today."""
    return {
        kind: [_current_group(kind, name) for name in names] if isinstance(names, list) else _current_group(kind, names)
        for kind, names in parts.items()
    }


def _current_group(kind: str, name: Any) -> Any:
    new_name = RENAMED_GROUPS.get((kind, name)) if isinstance(name, str) else None
    if new_name:
        warn_renamed(f'parts.{kind}: {name!r} is now {new_name!r}')
    return new_name or name


def warn_renamed(renamed: str) -> None:
    """Say that an old name was read, to the caller of the caller."""
    # FutureWarning, because Python hides a DeprecationWarning from users.
    warnings.warn(f'{renamed}; the next release will not read the old name', FutureWarning, stacklevel=3)
