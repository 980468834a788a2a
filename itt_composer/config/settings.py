"""Settings of this package's own algorithms and callbacks, and the model that each of them needs.

They are checked here before the start, and by the algorithms and callbacks themselves when they are built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from itt_composer.checks import check_choice, check_time, check_value
from itt_composer.options import ModelOptions

SHAPES = ('linear', 'cosine')
WITH_AN_INTERVAL = ('progress', 'router_weights', 'step_encodings', 'gradient_nuclear_norm')


def check_capacity_warmup(
    duration: Any = '0.05dur',
    initial: Any = 0.1,
    final: Any = None,
    shape: Any = 'linear',
    initial_temperature: Any = None,
) -> None:
    """Check the settings of ``capacity_warmup`` by themselves.

    Raises:
        ValueError: one line that names the setting.
    """
    check_choice('capacity_warmup.shape', shape, SHAPES)
    shares = 'float | list[float]'
    check_value('capacity_warmup.initial', initial, shares, above=0, maximum=1)
    check_value('capacity_warmup.final', final, f'{shares} | None', above=0, maximum=1)
    check_value('capacity_warmup.initial_temperature', initial_temperature, 'float | None', above=0)
    check_time('capacity_warmup.duration', duration)


def check_final_capacity(final_T: Sequence[float], token_ratios: Sequence[float]) -> None:
    """Refuse a capacity at the end of the training that is below that at the end of the warm-up."""
    for t, (ratio, share) in enumerate(zip(token_ratios, final_T, strict=True), start=1):
        if share < ratio:
            raise ValueError(f'capacity_warmup.final: {share} is below the ratio {ratio} of step {t}; it must grow')


def per_step(key: str, value: float | Sequence[float], steps: int) -> list[float]:
    """One value per step, from one number or from a list that must have one per step."""
    if not isinstance(value, Sequence):
        return [value] * steps
    if len(value) != steps:
        raise ValueError(
            f'capacity_warmup.{key}: {len(value)} values for {steps} extra steps; set one number, or one per step'
        )
    return list(value)


def check_own_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Check the settings of one of our algorithms or callbacks, whose names and types are already right.

    Raises:
        ValueError: one line that names the setting.
    """
    if name == 'capacity_warmup':
        check_capacity_warmup(**settings)
    elif name in WITH_AN_INTERVAL:
        for key, value in settings.items():
            if key.endswith('interval'):
                check_time(f'{name}.{key}', value)


def check_needs(name: str, settings: Mapping[str, Any], model: ModelOptions) -> None:
    """Refuse an algorithm or callback that has nothing to work on in a model.

    Raises:
        ValueError: one line that says what it needs.
    """
    routed = model.thinking == 'itt' and model.token_routing
    needs = {
        'capacity_warmup': ('thinking: itt and token_routing: true', routed),
        'router_weights': ('thinking: itt and token_routing: true', routed),
        'step_encodings': ('thinking: itt and step_encoding: true', model.thinking == 'itt' and model.step_encoding),
        'causal_gap': (
            'thinking: itt, token_routing: true and an evaluation_selection other than selection',
            routed and model.selection != model.evaluation_selection,
        ),
    }
    words, met = needs.get(name, ('', True))
    if not met:
        raise ValueError(f'{name}: needs a model with {words}; null leaves it out')
    if name == 'capacity_warmup':
        assert model.token_ratios is not None
        per_step('initial', settings.get('initial', 0.1), model.steps)
        if settings.get('final') is not None:
            check_final_capacity(per_step('final', settings['final'], model.steps), model.token_ratios)
