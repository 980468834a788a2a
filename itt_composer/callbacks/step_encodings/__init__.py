"""Log the learned thinking step encodings phi (Figure 6, middle; Section 4.4)."""

from __future__ import annotations

from composer.core import State, Time
from composer.loggers import Logger

from itt_composer.analysis.step_encodings import (
    encoded_layers,
    plot_step_encodings,
    step_encoding_table,
    step_encodings,
)
from itt_composer.callbacks.pictures import log_picture
from itt_composer.training.trainer_time import Interval, PeriodicCallback


class StepEncodings(PeriodicCallback):
    """Log mean and Euclidean norm of phi[t] of every thinking layer.

    Args:
        interval: time between two loggings, a time string; the first batch and the end of the training are logged too.
        picture_interval: time between two loggings with a figure; it comes with the first logging (also of a resumed
            run) and the last.

    Raises:
        ValueError: an interval is no time string; at INIT, the model has no step encodings.
    """

    def __init__(self, interval: str = '100ba', picture_interval: str = '1000ba'):
        self.interval = Interval('step_encodings.interval', interval)
        self.picture_interval = Interval('step_encodings.picture_interval', picture_interval)
        self._drawn_at: Time | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model without step encodings."""
        if not encoded_layers(state.model):
            raise ValueError(
                'step_encodings: the model has no step encodings; set thinking: itt and step_encoding: true, or remove '
                'the callback'
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log at the intervals."""
        if self.interval.due(state):
            self._log(state, logger, drawing=self.picture_interval.due(state))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log the result of the training."""
        if self._drawn_at != state.timestamp.batch:
            self._log(state, logger, drawing=True)

    def _log(self, state: State, logger: Logger, drawing: bool) -> None:
        table = step_encoding_table(step_encodings(state.model))
        logger.log_metrics(
            {
                f'step_encoding/layer{row.layer}/step{row.step}/{name}': getattr(row, name)
                for row in table.itertuples()
                for name in ('mean', 'norm')
            }
        )
        if drawing:
            self._drawn_at = state.timestamp.batch
            log_picture(logger, 'step_encoding/means', lambda: plot_step_encodings(table))
