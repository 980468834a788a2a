"""Commits the thresholds of threshold routing once per batch (:mod:`itt_composer.model.thresholds`)."""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger

from itt_composer.model import thinking_layers


class ThresholdCommit(Callback):
    """Commits at the end of each batch, before checkpoints and evaluations.

    Every resolved training config of a model with routers has it. Without it the model commits by itself when it sees
    that its routers have changed, which they have not where the learning rate was zero.
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        """Commit; local to each rank."""
        for layer in thinking_layers(state.model).values():
            layer.commit_thresholds()
