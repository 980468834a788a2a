"""Nested keys of a config: written as overrides, merged, crossed to a grid, and compared."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from itt_composer.training.resume import equal


def dotlist(settings: Mapping[str, Any], prefix: str = '') -> list[str]:
    """Return nested keys as ``a.b=value``, which OmegaConf reads back to the same values."""
    flat = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat += dotlist(value, f'{prefix}{key}.')
        else:
            plain = isinstance(value, str) and _stays_text(value)
            flat.append(f'{prefix}{key}={value if plain else json.dumps(value, ensure_ascii=False)}')
    return flat


@cache
def _stays_text(value: str) -> bool:
    """Whether OmegaConf reads the text without quotes as the same text; ``17``, ``1e-3`` and ``[1]`` it does not."""
    try:
        return merge(OmegaConf.from_dotlist([f'key={value}'])) == {'key': value}
    except (OmegaConfBaseException, yaml.YAMLError):
        return False


def merge(*layers: Any) -> dict[str, Any]:
    """Merge nested keys; later ones override."""
    merged = OmegaConf.to_container(OmegaConf.merge(*layers))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def grid_settings(grid: Mapping[str, Sequence[Any]], where: str) -> dict[str, dict[str, Any]]:
    """Return every combination of the values in ``{dotted key: [value, ...]}``, named as ``lr=0.003,delta``."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f'{where}: {key}: a grid needs a list of values')
    settings = {}
    for values in itertools.product(*grid.values()):
        pairs = dict(zip(grid, values, strict=True))
        name = ','.join(
            value if isinstance(value, str) else f'{key.rsplit(".", 1)[-1]}={json.dumps(value)}'
            for key, value in pairs.items()
        )
        settings[name] = _nested(pairs)
    return settings


def _nested(pairs: Mapping[str, Any]) -> dict[str, Any]:
    nested = OmegaConf.create({})
    for key, value in pairs.items():
        OmegaConf.update(nested, key, value)
    return merge(nested)


def compare_configs(before: DictConfig, now: DictConfig) -> str | None:
    """Return the first key in which two configs differ, with both values; None where they are the same."""
    flat_before, flat_now = (dict(item.split('=', 1) for item in dotlist(merge(c))) for c in (before, now))
    for key in sorted(flat_before.keys() | flat_now.keys()):
        if not equal(key, flat_before.get(key), flat_now.get(key)):
            return f'{key} was {flat_before.get(key)} and is now {flat_now.get(key)}'
    return None
