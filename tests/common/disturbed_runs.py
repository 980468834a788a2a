"""Runs of the smallest training config that are stopped, broken or continued, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.trainer import trainer as composer_trainer

from common.shards import write_data

# Its rate of a batch does not depend on max_duration.
CONSTANT = 'scheduler={name: constant_with_warmup, t_warmup: 1ba}'


def two_domains(folder: Path) -> Path:
    return write_data(folder, {'arxiv': 64, 'wiki': 32}, {'arxiv': 4, 'wiki': 4})


def checkpoints(run: Path) -> list[str]:
    """Names of a run's checkpoints."""
    return sorted(path.name for path in (run / 'checkpoints').glob('*ep*'))


def state(run: Path) -> dict[str, Any]:
    """What the latest checkpoint holds."""
    return torch.load(run / 'checkpoints' / 'latest-rank0.pt', weights_only=False)['state']


def each_batch(monkeypatch: pytest.MonkeyPatch, function: Callable[[State], object]) -> None:
    """Have ``function`` called at the start of each batch of the trainings to come."""

    class Disturbance(Callback):
        def batch_start(self, state, logger):
            function(state)

    start = composer_trainer.Trainer.__init__

    def with_disturbance(self, *arguments, callbacks=None, **options):
        start(self, *arguments, callbacks=[*(callbacks or []), Disturbance()], **options)

    monkeypatch.setattr(composer_trainer.Trainer, '__init__', with_disturbance)
