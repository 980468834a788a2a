"""The benchmarks run, on shapes that take no time, and count what they say they count."""

import csv
import sys

import pytest
import torch
from conftest import REPO

sys.path.insert(0, str(REPO / 'benchmarks'))
import contestants
import loss_head
import memory
import mfu
import model_step
from routed_pairs import RoutedPairs

from itt_composer.flops import Decoder, exact_flops
from itt_composer.model.routing_state import RoutingRecord


def test_live_bytes_by_hand():
    with memory.LiveBytes() as live:
        a = torch.zeros(1000, dtype=torch.float32)
        b = a.view(10, 100) + 1  # A view is no memory.
        del a
        c = torch.zeros(500, dtype=torch.bfloat16)
        assert live.now == 4000 + 1000
        del b, c
        assert live.now == 0
    assert live.peak == 4000 + 4000


def test_counted_peak_has_weights_gradients_moments_and_fewer_logits():
    B, S = 4, 1024
    unchunked, chunked = (memory.peak_bytes(name, 'reduced', B, S) for name in (memory.UNCHUNKED, 'dense'))
    weights = sum(p.numel() for p in contestants.build('dense', contestants.shape('reduced', S), 'cpu').parameters())
    assert chunked > 16 * weights
    assert unchunked - chunked > 4 * B * S * 8000


def test_flops_of_a_layer_alone():
    shape = contestants.shape('reduced', 64)
    decoder = Decoder.from_model_config({**shape, 'thinking': 'itt'})
    count = exact_flops(decoder, 64)
    layers = [model_step.flops(f'layer: {name}', shape, 64) for name in ('dense', 'itt x4 refresh')]
    assert 4 * sum(layers) == 3 * (count.total - count.head)
    assert model_step.flops('itt x4 refresh', shape, 64) == 3 * count.total


def records(shape: dict, S: int, routed) -> list[RoutingRecord]:
    """Records of a forward pass of two sequences whose every step routes the positions ``routed(k)``."""
    decoder = Decoder.from_model_config({**shape, 'thinking': 'itt'})
    found = []
    for layer in decoder.thinking_layers:
        for t, ratio in enumerate(decoder.token_ratios, start=1):
            routed_BS = torch.zeros(2, S, dtype=torch.bool)
            routed_BS[:, routed(int(ratio * S))] = True
            found.append(RoutingRecord(layer, t, torch.zeros(2, S), routed_BS, torch.zeros(())))
    return found


def test_flops_follow_the_positions_that_were_routed():
    S, shape = 100, contestants.shape('reduced', 100)
    early, late = (
        RoutedPairs.of(records(shape, S, routed), 'refresh')
        for routed in (lambda k: slice(0, k), lambda k: slice(S - k, S))
    )
    # The first k tokens see one another and no other key, as in routed_only.
    alone = model_step.flops('itt x4 routed_only', shape, S)
    assert model_step.flops('itt x4 refresh', shape, S, early) == alone
    # Mirrored positions have the mirrored pairs, so that the mean of both is the even spread.
    assert early.routed + late.routed == 2 * early.even
    assert model_step.flops('itt x4 refresh', shape, S, late) > model_step.flops('itt x4 refresh', shape, S) > alone
    only = RoutedPairs.of(records(shape, S, lambda k: slice(S - k, S)), 'routed_only')
    assert only.routed == only.even == early.routed


def test_foundrys_flops_by_hand():
    shape = contestants.shape('reduced', 64)
    layer = 4 * 256 * 256 + 3 * 256 * 640 + 2 * 256
    weights = 8 * layer + 256 + 8000 * 256  # The embedding is not counted, the head is.
    assert mfu.foundry_flops(Decoder.from_model_config(shape), 64) == 6 * weights * 64 + 12 * 8 * 256 * 64 * 64


def test_steps_that_are_timed_change_no_weight():
    model = contestants.build('itt x4 refresh', contestants.shape('reduced', 32), 'cpu')
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    contestants.step_of(model, torch.arange(32)[None])()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_table_of_a_step(tmp_path, capsys, monkeypatch):
    routed = RoutedPairs(routed=3e6, even=2e6)
    monkeypatch.setattr(RoutedPairs, 'of', lambda records, thinking_kv: routed if records else None)
    out = tmp_path / 'results' / 'step.csv'
    options = dict(sequence_length=32, batch_size=1, rounds=1, peers=False, compiled=False, layers=True)
    model_step.main(size='reduced', only='itt x4 refresh', out=out, **options)
    rows = list(csv.DictReader(out.open()))
    assert [row['model'] for row in rows] == ['itt x4 refresh', 'layer: itt x4 refresh']
    keys = contestants.shape('reduced', 32)
    for row in rows:
        name = row['model']
        count, dense = (
            model_step.flops(name, keys, 32, routed),
            model_step.flops(model_step.reference_of(name), keys, 32),
        )
        assert row['pairs'] == '1.500' and row['FLOPs ratio'] == f'{count / dense:.3f}'
        assert float(row['overhead']) == pytest.approx(float(row['time ratio']) * dense / count, rel=2e-3, abs=2e-3)
        assert row['torch'] == torch.__version__ and row['date'] and row['device'] and '32' in row['what']
    assert 'overhead' in capsys.readouterr().out


def test_profile_lies_beside_the_table(tmp_path):
    options = dict(sequence_length=32, batch_size=1, rounds=1, peers=False, compiled=False, profile=True)
    model_step.main(size='reduced', only='layer: dense', out=tmp_path / 'step.csv', **options)
    kernels = list(csv.DictReader((tmp_path / 'step-kernels.csv').open()))
    assert {row['model'] for row in kernels} == {'layer: dense'}
    # Seven projections, each with two products in the backward pass.
    assert next(row['calls per step'] for row in kernels if row['kernel'] == 'aten::mm') == '21'
    assert all(0 <= float(row['fraction']) <= 1 for row in kernels)


def test_every_way_of_the_loss_head_has_the_same_loss(tmp_path):
    loss_head.main(rounds=1, backend='eager', out=tmp_path / 'loss.csv')
    rows = list(csv.DictReader((tmp_path / 'loss.csv').open()))
    assert len(rows) == 6 and len({row['loss'] for row in rows}) == 1


def test_a_profile_without_a_place_is_refused():
    with pytest.raises(SystemExit, match=r'--profile: .*set --out'):
        model_step.main(profile=True)


def test_unknown_size_is_named():
    with pytest.raises(SystemExit, match='--size 100m: no such size'):
        contestants.shape('100m', 64)
