"""The scaling of rotary frequencies as an option: which kinds there are, and what they hold. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from itt_composer.checks import check_choice, check_keys, check_value

# Keys that each kind has beside `rope_type`, all of them numbers.
KINDS = {
    'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
}


def checked_rope_scaling(given: Mapping[str, Any], rope_theta: float) -> dict[str, Any] | None:
    """What is used of the option ``rope_scaling``; None for the kind that scales nothing.

    Raises:
        ValueError: an unknown kind, an unknown, missing or bad number, another ``rope_theta`` than the option.
    """
    scaling: dict[str, Any] = dict(given)
    # Transformers 5 puts a copy of it there.
    if (theta := scaling.pop('rope_theta', rope_theta)) != rope_theta:
        raise ValueError(f'rope_scaling.rope_theta: {theta} here, and rope_theta is {rope_theta}; leave it out')
    kind: Any = scaling.get('rope_type', scaling.get('type'))  # Older configs have the other name, or both.
    if kind == 'default':
        return None
    check_choice('rope_scaling.rope_type', kind, tuple(KINDS))
    check_keys(scaling, ('type', 'rope_type', *KINDS[kind]), 'rope_scaling')
    for key in KINDS[kind]:
        check_value(f'rope_scaling.{key}', scaling.get(key), 'float', above=0)
    if kind == 'llama3' and scaling['high_freq_factor'] <= scaling['low_freq_factor']:
        raise ValueError(
            f'rope_scaling.high_freq_factor: expected more than low_freq_factor ({scaling["low_freq_factor"]}), got '
            f'{scaling["high_freq_factor"]}'
        )
    return {'rope_type': kind, **{key: scaling[key] for key in KINDS[kind]}}
