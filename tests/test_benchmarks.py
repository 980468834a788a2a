"""The benchmarks run, on shapes that take no time, and count what they say they count."""

import csv
import sys

import pytest
import torch
from conftest import REPO

sys.path.insert(0, str(REPO / 'benchmarks'))
import contestants
import memory
import model_step

from itt_composer.flops import Decoder, exact_flops


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
    B, S = 8, 1024
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


def test_table_of_a_step(tmp_path, capsys):
    out = tmp_path / 'results' / 'step.csv'
    options = dict(sequence_length=32, batch_size=1, rounds=1, peers=False, compiled=False, layers=True)
    model_step.main(size='reduced', only='itt x4 refresh', out=out, **options)
    rows = list(csv.DictReader(out.open()))
    assert [row['model'] for row in rows] == ['itt x4 refresh', 'layer: itt x4 refresh']
    for row in rows:
        assert float(row['overhead']) == pytest.approx(
            float(row['time ratio']) / float(row['FLOPs ratio']), rel=2e-3, abs=2e-3
        )
        assert row['torch'] == torch.__version__ and row['date'] and row['device'] and '32' in row['what']
    assert 'overhead' in capsys.readouterr().out


def test_unknown_size_is_named():
    with pytest.raises(SystemExit, match='--size 100m: no such size'):
        contestants.shape('100m', 64)
