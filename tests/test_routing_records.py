"""Which tokens the layers routed, and the histogram of their gates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common import small_models
from common.token_rows import ITT, rows
from torch.testing import assert_close

from itt_composer.analysis.router_weights import RoutedTokens, histogram
from itt_composer.analysis.routing_records import token_thinking


@pytest.mark.parametrize('selection', ['threshold', 'top_k'])
def test_token_thinking_is_what_the_layers_record(selection):
    model, ids = small_models.build(**ITT), rows(5)
    model.set_thinking(selection=selection)
    thinking = token_thinking(model, ids, batch_size=2)
    assert thinking.layer_steps == [(layer, step) for layer in (0, 2) for step in (1, 2, 3)]
    with model.routing.recording() as recorded:
        model(ids)
    assert 0 < thinking.routed_MNS.mean() < 1
    for m, record in enumerate(recorded):
        assert_close(torch.tensor(thinking.gate_MNS[m]), record.gate_BS)
        assert torch.equal(torch.tensor(thinking.routed_MNS[m]), record.routed_BS)
    depth = sum(record.routed_BS.long() for record in recorded)
    assert torch.equal(torch.tensor(thinking.depth_NS), depth)


def test_recording_is_off_afterwards_also_after_an_error():
    model = small_models.build(**ITT)
    token_thinking(model, rows())
    with pytest.raises(ValueError, match='257 tokens'):
        token_thinking(model, rows(1, 257))
    assert model.routing.records is None


def test_a_removed_step_is_left_out_and_a_plain_model_is_refused():
    model = small_models.build(**ITT)
    model.set_thinking([0.7, 0, 0.7])
    assert token_thinking(model, rows()).layer_steps == [(0, 1), (0, 3), (2, 1), (2, 3)]
    with pytest.raises(ValueError, match='routes no tokens'):
        token_thinking(small_models.build(), rows())


def test_histogram_holds_every_token_once():
    gate_N = np.array([0.0, 0.1, 0.1, 0.5, 1.0])
    table = histogram({(2, 2): RoutedTokens(gate_N, gate_N > 0.2, 0.0)}, bins=10)
    assert table['routed'].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert table['not_routed'].tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    assert set(table['layer']) == {2} and set(table['step']) == {2}
    tanh = histogram({(0, 1): RoutedTokens(gate_N - 0.5, gate_N > 0.2, 0.0)})
    assert tanh['low'].min() == -1 and tanh[['routed', 'not_routed']].to_numpy().sum() == 5
