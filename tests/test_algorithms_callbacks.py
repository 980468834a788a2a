"""Algorithms and callbacks: one train-and-resume test for all, and what all have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common.algorithm_settings import PARTS, Part
from common.composer_runs import SHARDED
from common.ranks import run_on_ranks, use_fsdp2_over_gloo
from common.tiny_runs import Images, fit, parameters, tiny_model, trainer
from composer import Callback

from itt_composer.algorithms.capacity_warmup import CapacityWarmup
from itt_composer.analysis.figure_style import to_array
from itt_composer.analysis.router_weights import RoutedTokens, histogram, plot_router_weights
from itt_composer.analysis.step_encodings import plot_step_encodings, step_encoding_table
from itt_composer.callbacks.gradient_nuclear_norm import (
    plot_gradient_nuclear_norms,
)
from itt_composer.callbacks.router_weights import RouterWeights
from itt_composer.callbacks.step_encodings import StepEncodings


@pytest.fixture(scope='module')
def trained_alone():
    model = tiny_model()
    fit(model, max_duration='6ba')
    return parameters(model)


@pytest.mark.parametrize('part', PARTS, ids=lambda part: part.cls.__name__)
def test_trains_and_resumes(part: Part, trained_alone, tmp_path):
    whole_model = tiny_model()
    saves = dict(save_folder=str(tmp_path), save_interval='3ba')
    whole = fit(whole_model, [part.cls(**part.settings)], max_duration='6ba', **saves)
    assert part.metrics <= set(whole)
    # A callback only watches; an algorithm changes the training.
    assert torch.equal(parameters(whole_model), trained_alone) == issubclass(part.cls, Callback)

    resumed_model = tiny_model()
    checkpoint = tmp_path / 'ep0-ba3-rank0.pt'
    resumed = fit(resumed_model, [part.cls(**part.settings)], max_duration='6ba', load_path=str(checkpoint))

    assert torch.equal(parameters(resumed_model), parameters(whole_model))
    for name in part.metrics:
        assert resumed[name] == [(batch, value) for batch, value in whole[name] if batch >= 3], name
    assert resumed['loss/train/total'] == whole['loss/train/total'][3:]


def fit_sharded():
    use_fsdp2_over_gloo()
    images = Images()
    logged = fit(
        tiny_model(),
        [part.cls(**part.settings) for part in PARTS],
        loggers=[images],
        microbatch=2,
        max_duration='5ba',
        parallelism_config={'fsdp': SHARDED},
    )
    return logged, set(images.images)


def test_two_fsdp_ranks_log_what_one_logs():
    one, pictures = run_on_ranks(1, fit_sharded)[0]  # at one rank Composer drops the sharding
    (first, first_pictures), (second, second_pictures) = run_on_ranks(2, fit_sharded)
    assert first_pictures == pictures == {'router/gate_values', 'step_encoding/means', 'gradient_nuclear_norm/layers'}
    assert not second_pictures
    compared = 0
    for name, series in one.items():
        # Quantiles are means of the ranks' own, thresholds follow each rank's own tokens.
        exact = name.startswith(('capacity', 'router_temp', 'step_encoding', 'gradient_nuclear')) or name.endswith(
            ('gate_mean', 'fraction_routed')
        )
        if exact:
            compared += 1
            for of_rank in (first, second):
                assert [batch for batch, _ in of_rank[name]] == [batch for batch, _ in series]
                assert [v for _, v in of_rank[name]] == pytest.approx([v for _, v in series], rel=2e-3, abs=1e-6), name
    assert compared == 3 + 4 * 2 + 2 * 3 * 2 + 3 * 4


@pytest.mark.parametrize(
    ('part', 'keys', 'message'),
    [
        (CapacityWarmup, {'thinking': 'none', 'token_ratios': None}, 'capacity_warmup: a model with thinking: none'),
        (CapacityWarmup, {'thinking': 'loop', 'token_ratios': None}, 'capacity_warmup: a model with thinking: loop'),
        (CapacityWarmup, {'token_routing': False}, 'capacity_warmup: with token_routing: false'),
        (RouterWeights, {'thinking': 'none', 'token_ratios': None}, 'router_weights: the model has no routers'),
        (RouterWeights, {'token_routing': False}, 'router_weights: the model has no routers'),
        (StepEncodings, {'step_encoding': False}, 'step_encodings: the model has no step encodings'),
    ],
)
def test_a_model_without_what_is_needed_is_refused_at_once(part, keys, message):
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(**keys), [part()])


def router_picture(tokens):
    return plot_router_weights(histogram(tokens))


@pytest.mark.parametrize(
    'draw',
    [
        lambda: router_picture(
            {(1, 1): RoutedTokens(np.array([-0.5, 0.5]), np.array([False, True]), 0.0)}  # tanh, one panel
        ),
        lambda: router_picture(
            {(i, t): RoutedTokens(np.ones(4), np.full(4, i == 1), 0.0) for i in (1, 3) for t in (1, 2)}  # all, none
        ),
        lambda: plot_step_encodings(step_encoding_table({i: torch.rand(3, 4) for i in range(1, 33)})),
        lambda: plot_gradient_nuclear_norms({(0, 'q_proj'): 0.0, (1, 'q_proj'): 1.0}),
    ],
)
def test_pictures_are_arrays_with_something_on_them(draw):
    image_HWC = to_array(draw())
    assert image_HWC.dtype == np.uint8 and image_HWC.ndim == 3 and image_HWC.shape[2] == 3
    assert len(np.unique(image_HWC.reshape(-1, 3), axis=0)) > 10
