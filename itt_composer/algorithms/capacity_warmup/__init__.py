"""getCapacity of Algorithm 1: the capacity of each step grows over the first part of the training."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from itt_composer.config.settings import check_capacity_warmup, check_final_capacity, per_step
from itt_composer.model import ITTForCausalLM, routing_state
from itt_composer.training.trainer_time import parse_time, progress, training_length

log = logging.getLogger(__name__)

# EVAL_BEFORE_ALL comes while the trainer's epoch length is still the training set's; EVAL_START does not.
EVENTS = (Event.INIT, Event.FIT_START, Event.BATCH_START, Event.EVAL_BEFORE_ALL, Event.EVAL_STANDALONE_START)


def get_capacity(
    elapsed: float,
    ratio: float,
    initial: float,
    *,
    shape: str = 'linear',
    final: float | None = None,
    total: float | None = None,
) -> float:
    """Return getCapacity(P, rho, tau) of Algorithm 1 (Appendix A.1), with elapsed = P / tau.

    Args:
        elapsed: time since the start, in warm-ups: 0 at the start, 1 at the end of the warm-up.
        ratio: rho, the capacity (fraction of tokens) after the warm-up.
        initial: capacity at the start; a smaller ``ratio`` replaces it.
        shape: ``linear``, or ``cosine`` (slow at both ends).
        final: capacity at the end of the training; None stays at ``ratio``.
        total: length of the training, in warm-ups; needed with ``final``.

    Returns:
        The fraction of tokens routed to the step, between ``min(initial, ratio)`` and ``final`` or ``ratio``.
    """
    if elapsed < 1:
        return interpolate(elapsed, min(initial, ratio), ratio, shape)
    if final is None:
        return ratio
    assert total is not None, 'a final capacity needs the length of the training'
    return final if elapsed >= total else interpolate((elapsed - 1) / (total - 1), ratio, final, shape)


def interpolate(fraction: float, start: float, end: float, shape: str) -> float:
    """Interpolate from ``start`` to ``end`` at ``fraction`` (0 to 1), along a line or half a cosine."""
    if shape == 'cosine':
        fraction = (1 - math.cos(math.pi * fraction)) / 2
    return start + (end - start) * fraction


def apply_capacity(model: torch.nn.Module, capacity_T: Sequence[float], temperature: float | None = None) -> None:
    """Set the capacity of each step, and the router temperature unless it is None, of an ITT model."""
    state = routing_state(model)
    assert state is not None
    state.capacity_T = list(capacity_T)
    if temperature is not None:
        state.temperature = temperature


class CapacityWarmup(Algorithm):
    """Grow the capacity of each step from ``initial`` to the model's ``token_ratios`` over ``duration``.

    The capacity is a pure function of the trainer's timestamp, so a resumed run has the capacity of one never stopped.
    It is set on :attr:`.Event.BATCH_START`, and before an evaluation to that of the training batch that follows.

    Args:
        duration: tau, the length of the warm-up, as a time string: ``500ba``, ``0.05dur``, ``1e9tok``, ``1ep``.
        initial: fraction of tokens at the start, in (0, 1]; one number, or one for each step. A step with a smaller
            ratio starts at its ratio.
        final: fraction of tokens at the end of the training, in [ratio, 1]; one number, or one for each step. None: the
            ratio.
        shape: ``linear`` or ``cosine``.
        initial_temperature: router temperature at the start, annealed over the warm-up to the model's
            ``router_temperature``. None: the model's own.

    Raises:
        ValueError: a setting is invalid; at INIT, the model has no routers.
    """

    def __init__(
        self,
        duration: str = '0.05dur',
        initial: float | Sequence[float] = 0.1,
        final: float | Sequence[float] | None = None,
        shape: str = 'linear',
        initial_temperature: float | None = None,
    ):
        check_capacity_warmup(duration, initial, final, shape, initial_temperature)
        self.duration = parse_time('capacity_warmup.duration', duration)
        self.initial = initial
        self.final = final
        self.shape = shape
        self.initial_temperature = initial_temperature

    def match(self, event: Event, state: State) -> bool:
        """Run at the events that come before a forward pass, and at INIT for the checks."""
        # An evaluation without training has no position in it: the model's own ratios are used.
        return event in EVENTS and not (event == Event.EVAL_STANDALONE_START and state.max_duration is None)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Check the model at INIT; set capacity and temperature at the other events."""
        config = routed_config(state.model)
        ratio_T = config.token_ratios
        initial_T = per_step('initial', self.initial, len(ratio_T))
        final_T: list[float | None] = [None] * len(ratio_T)
        if self.final is not None:
            grown_T = per_step('final', self.final, len(ratio_T))
            check_final_capacity(grown_T, ratio_T)
            final_T = [*grown_T]
        if event == Event.INIT:
            if self.final is not None:
                log.warning(
                    f'capacity_warmup.final: thresholds follow the capacity, so at the end they belong to {self.final} '
                    'and not to the model’s token_ratios; calibrate the exported model before use '
                    '(itt calibrate)'
                )
            return
        if event == Event.FIT_START:
            self._check_length(state)

        elapsed = progress(state, self.duration.unit) / self.duration.value
        total = self._total(state) if self.final is not None else None
        capacity_T = [
            get_capacity(elapsed, ratio, initial, shape=self.shape, final=final, total=total)
            for ratio, initial, final in zip(ratio_T, initial_T, final_T, strict=True)
        ]
        temperature = None
        if self.initial_temperature is not None:
            temperature = interpolate(min(elapsed, 1), self.initial_temperature, config.router_temperature, self.shape)
        apply_capacity(state.model, capacity_T, temperature)

        if event == Event.BATCH_START:
            logger.log_metrics({f'capacity/step{t}': capacity for t, capacity in enumerate(capacity_T, start=1)})
            if temperature is not None:
                logger.log_metrics({'router_temperature': temperature})

    def state_dict(self) -> dict[str, Any]:
        """Return the settings; the capacity itself is a function of the trainer's timestamp."""
        return {**super().state_dict(), 'settings': self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn of each setting that differs from the checkpoint; the settings of the training config are used."""
        for key, now in self._settings().items():
            before = state['settings'].get(key)
            if before != now:
                log.warning(
                    f'capacity_warmup.{key}: the checkpoint was trained with {before}; the resumed run uses {now}'
                )

    def _settings(self) -> dict[str, Any]:
        return {
            'duration': self.duration.to_timestring(),
            'initial': _as_list(self.initial),
            'final': _as_list(self.final),
            'shape': self.shape,
            'initial_temperature': self.initial_temperature,
        }

    def _check_length(self, state: State) -> None:
        """Warn of a training that ends within its warm-up; it may be extended later."""
        length = training_length(state, self.duration.unit)
        if length is not None and self.duration.value > length:
            log.warning(
                f'capacity_warmup.duration: {self.duration} is longer than the training, {state.max_duration}; it ends '
                'with a capacity below the model’s token_ratios, and with thresholds for that capacity'
            )

    def _total(self, state: State) -> float:
        length = training_length(state, self.duration.unit)
        if length is None:
            assert state.max_duration is not None
            raise ValueError(
                f'capacity_warmup.duration: with final, expected the unit of max_duration ({state.max_duration}) or '
                f'dur, got {self.duration}; set 0.05dur, for example'
            )
        if length <= self.duration.value:
            raise ValueError(
                f'capacity_warmup.duration: with final, expected less than the training, got {self.duration}; set a '
                'shorter one'
            )
        return length / self.duration.value


def routed_config(model: torch.nn.Module) -> Any:
    """Return the config of the ITT model inside ``model``, or raise a ValueError where it routes no tokens."""
    config: Any = next((m.config for m in model.modules() if isinstance(m, ITTForCausalLM)), None)
    if config is None or config.thinking != 'itt':
        found = f'a model with thinking: {config.thinking}' if config is not None else type(model).__name__
        raise ValueError(f'capacity_warmup: {found} has no routers; set model.thinking: itt, or remove the algorithm')
    if not config.token_routing:
        raise ValueError(
            'capacity_warmup: with token_routing: false every token takes every step; remove the algorithm'
        )
    return config


def _as_list(value: float | Sequence[float] | None) -> float | list[float] | None:
    return list(value) if isinstance(value, Sequence) else value
