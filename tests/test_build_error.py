"""An error while foundry builds a section is one line that names the section; one of the training keeps its frames."""

from __future__ import annotations

import pytest
from torch import nn

from itt_composer.training.build_error import build_error


def error_of(build, *arguments) -> str | None:
    with pytest.raises(Exception) as raised:
        build(*arguments)
    return build_error(raised.value)


def test_the_section_is_named():
    from llmfoundry.utils import builders

    assert error_of(builders.build_scheduler, 'cosine_with_warmup', {'t_warmup': '5parsecs'}).startswith(
        'scheduler: cannot be built: '
    )
    line = error_of(builders.build_callback, 'early_stopper', {'monitor': 'a', 'dataloader_label': 'b', 'comp': 'no'})
    assert line.startswith('callbacks.early_stopper: cannot be built: ') and '\n' not in line
    line = error_of(builders.build_optimizer, nn.Linear(2, 2), 'decoupled_adamw', {'betas': [0.9, 2]})
    assert line.startswith('optimizer: cannot be built: ') and line.endswith('; --verbose shows where')


def test_its_cause_is_named_too():
    def build_dataloader():
        try:
            int('a')
        except ValueError as error:
            raise RuntimeError('misconfigured') from error

    line = error_of(build_dataloader)
    assert line.startswith(
        'train_loader: cannot be built: RuntimeError: misconfigured (invalid literal for int() with base'
    )


def test_an_error_of_the_training_is_left_alone():
    def fit():
        raise ValueError('loss')

    def build_scheduler():
        fit()

    assert error_of(build_scheduler) is None
    assert error_of(int, 'a') is None
