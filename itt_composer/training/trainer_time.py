"""Where a Composer run stands in time, as functions of its timestamp, so that a resumed run gets the same answers."""

from __future__ import annotations

import math
from typing import Any

from composer.core import Callback, State, Time, TimeUnit

from itt_composer.checks import check_time


def parse_time(key: str, value: Any) -> Time:
    """Read a positive time such as ``500ba``, ``2ep``, ``1e9tok``, ``10000sp`` or ``0.05dur`` (fraction of training).

    Raises:
        ValueError: naming ``key``, where ``value`` is not such a string.
    """
    check_time(key, value)
    return Time.from_timestring(value)


def progress(state: State, unit: TimeUnit) -> float:
    """How far the training is, in ``unit``; epochs as a fraction where the epoch's length is known."""
    if unit == TimeUnit.DURATION:
        assert state.max_duration is not None, 'the trainer sets max_duration before it fits'
        return progress(state, state.max_duration.unit) / state.max_duration.value
    if unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        return state.timestamp.epoch.value + state.timestamp.batch_in_epoch.value / state.dataloader_len.value
    return state.timestamp.get(unit).value


def training_length(state: State, unit: TimeUnit) -> float | None:
    """How long the complete training is, in ``unit``; None where that cannot be known before its end."""
    assert state.max_duration is not None, 'the trainer sets max_duration before it fits'
    if unit == TimeUnit.DURATION:
        return 1.0
    if unit == state.max_duration.unit:
        return float(state.max_duration.value)
    if state.dataloader_len is not None:
        batches_per_epoch = state.dataloader_len.value
        if (state.max_duration.unit, unit) == (TimeUnit.EPOCH, TimeUnit.BATCH):
            return float(state.max_duration.value * batches_per_epoch)
        if (state.max_duration.unit, unit) == (TimeUnit.BATCH, TimeUnit.EPOCH):
            return state.max_duration.value / batches_per_epoch
    return None


def is_last_batch(state: State) -> bool:
    """Whether the batch about to run ends the training, if it has as many samples and tokens as the one before."""
    assert state.max_duration is not None, 'the trainer sets max_duration before it fits'
    unit = state.max_duration.unit
    if unit == TimeUnit.BATCH:
        batch = 1.0
    elif unit == TimeUnit.EPOCH:
        batch = 1 / state.dataloader_len.value if state.dataloader_len is not None else 0.0
    elif state.previous_timestamp is not None:
        batch = state.timestamp.get(unit).value - state.previous_timestamp.get(unit).value
    else:
        batch = 0.0
    return progress(state, unit) + batch >= state.max_duration.value - 1e-9


class Interval:
    """Says once an interval, and at the first question, that it is time; its state makes a resumed run say the same.

    Args:
        key: name of the setting, for messages.
        value: length of the interval, a time string as :func:`parse_time` takes.
    """

    def __init__(self, key: str, value: Any):
        self.length = parse_time(key, value)
        self._last: int | None = None

    def due(self, state: State) -> bool:
        """Whether an interval has begun since the last call that was True."""
        # 0.3 / 0.1 is just under 3 in floating point.
        current = math.floor(progress(state, self.length.unit) / self.length.value + 1e-9)
        if current == self._last:
            return False
        self._last = current
        return True

    def state_dict(self) -> dict[str, Any]:
        """The interval that began last, with its length: after a change of length the count starts anew."""
        return {'length': self.length.to_timestring(), 'last': self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the count of a checkpoint; a run resumed with another length starts its own."""
        if state.get('length') == self.length.to_timestring():
            self._last = state['last']


class PeriodicCallback(Callback):
    """A callback with an ``interval``, within which a resumed run goes on."""

    interval: Interval

    def state_dict(self) -> dict[str, Any]:
        """Return the position within the interval."""
        return {'interval': self.interval.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position within the interval."""
        self.interval.load_state_dict(state['interval'])
