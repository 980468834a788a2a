"""Logs what the thinking step encodings phi have learned (Figure 6, middle; Section 4.4)."""

from __future__ import annotations

from typing import Any

from composer.core import Callback, State, Time
from composer.loggers import Logger

from itt_composer.analysis.step_encodings import (
    encoded_layers,
    plot_step_encodings,
    step_encoding_table,
    step_encodings,
)
from itt_composer.callbacks.pictures import log_picture
from itt_composer.training.trainer_time import Interval


class StepEncodings(Callback):
    """Logs mean and Euclidean norm of phi[t] of every thinking layer at an interval and at the end of the training.

    Args:
        interval: time between looks, a time string; the first batch and the end of the training are looked at too.

    Raises:
        ValueError: for a bad interval; as soon as the model is seen, where it has no step encodings.
    """

    def __init__(self, interval: str = '100ba'):
        self.interval = Interval('step_encodings.interval', interval)
        self._logged_at: Time | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model without step encodings."""
        if not encoded_layers(state.model):
            raise ValueError(
                'step_encodings: the model has no step encodings; it needs thinking: itt and step_encoding: true'
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log where an interval has begun."""
        if self.interval.due(state):
            log_encodings(state, logger)
            self._logged_at = state.timestamp.batch

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log what the training ended with."""
        if self._logged_at != state.timestamp.batch:
            log_encodings(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """Where the interval stands."""
        return {'interval': self.interval.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the interval."""
        self.interval.load_state_dict(state['interval'])


def log_encodings(state: State, logger: Logger) -> None:
    """Log mean and norm of each phi[t], and the picture of the means."""
    table = step_encoding_table(step_encodings(state.model))
    for name in ('mean', 'norm'):
        logger.log_metrics(
            {
                f'step_encoding/{layer}-{step}/{name}': value
                for layer, step, value in zip(table['layer'], table['step'], table[name], strict=True)
            }
        )
    log_picture(logger, 'step_encoding/means', lambda: plot_step_encodings(table))
