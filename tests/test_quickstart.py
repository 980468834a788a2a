"""The quickstart's figures, from TensorBoard files with known content; its commands are run by people and by hand."""

import csv
import json
import struct

import numpy as np
import pytest
from common.shards import write_tokenizer
from conftest import REPO
from torch.utils.tensorboard import SummaryWriter

from itt_composer.analysis.token_page import Passage
from research.quickstart import command
from research.quickstart.page import write_page
from research.quickstart.results import read_result, write_csv
from research.quickstart.samples import Samples

DOMAINS = {'cc': (30, [5.0, 4.0]), 'wiki': (10, [4.0, 2.0])}
TOP_K = {'cc': 3.9, 'wiki': 1.8}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Data, a manifest, and the event files of an ITT run of 20 batches with two evaluations."""
    folder = tmp_path_factory.mktemp('quickstart')
    write_tokenizer(folder / 'data' / 'tokenizer')
    manifest = {'domains': {domain: {'validation': {'rows': rows}} for domain, (rows, _) in DOMAINS.items()}}
    (folder / 'data' / 'manifest.json').write_text(json.dumps(manifest))
    with SummaryWriter(str(folder / 'runs' / 'tensorboard' / 'itt_x4_tiny')) as writer:
        for batch in range(20):
            writer.add_scalar('loss/train/total', 6 - batch / 10, batch)
            writer.add_scalar('throughput/tokens_per_sec', [100, 200, 300][batch % 3], batch)
            writer.add_scalar('time/train', batch / 3600, batch)
        for domain, (_, losses) in DOMAINS.items():
            for batch, loss in zip((10, 20), losses, strict=True):
                writer.add_scalar(f'metrics/eval/{domain}/LanguageCrossEntropy', loss, batch)
            writer.add_scalar(f'causal_gap/eval/{domain}/cross_entropy_top_k', TOP_K[domain], 20)
        writer.add_image('router/gate_values', np.full((4, 6, 3), 7, np.uint8), 20, dataformats='HWC')
    return folder


def result(folder):
    return read_result('ITT x4', REPO / 'yamls' / 'itt_x4_tiny.yaml', folder / 'data', folder / 'runs')


def test_the_evaluation_loss_is_the_mean_over_rows(folder):
    got = result(folder)
    assert got.validation_loss == [(10, pytest.approx((30 * 5 + 10 * 4) / 40)), (20, pytest.approx(3.5))]
    assert got.top_k_loss == pytest.approx((30 * 3.9 + 10 * 1.8) / 40)
    assert got.domain_losses == {'cc': 4.0, 'wiki': 2.0}
    width, height = struct.unpack('>II', got.pictures['router/gate_values'][16:24])
    assert (width, height) == (6, 4)


def test_the_page_and_the_table_show_the_figures(folder):
    got = result(folder)
    write_csv([got], folder / 'results.csv')
    with open(folder / 'results.csv', newline='') as file:
        (row,) = csv.DictReader(file)
    assert (row['model'], row['loss, threshold'], row['loss, top-k']) == ('ITT x4', '3.5000', '3.3750')
    gates = np.array([[0.2, 0.9]])
    passage = Passage('A text', ['one', ' <two>'], ['layer0/step1'], gates, gates > 0.5, set())
    samples = Samples('a prompt', {'ITT x4': 'goes <on>'}, passage)
    page = write_page([got], samples, [('See:', 'make see MODEL=x')], folder / 'index.html').read_text()
    for text in ('3.5000', '4.0000', 'wiki', 'goes &lt;on&gt;', ' &lt;two&gt;', 'layer0/step1', 'make see MODEL=x'):
        assert text in page
    assert page.count('data:image/png;base64,') == 2
    assert 'src="http' not in page


def test_a_run_without_evaluation_is_named(folder):
    with SummaryWriter(str(folder / 'runs' / 'tensorboard' / 'llama_tiny')) as writer:
        writer.add_scalar('loss/train/total', 6.0, 0)
    with pytest.raises(ValueError, match='llama_tiny: no evaluation loss'):
        read_result('LLaMA', REPO / 'yamls' / 'llama_tiny.yaml', folder / 'data', folder / 'runs')


def test_the_time_left_counts_flops_and_what_is_outside_the_batches(folder):
    left = command.TimeLeft(folder / 'data')
    left.flops = {'llama_tiny': 1.0, 'loop_x4_tiny': 2.0, 'itt_x4_tiny': 1.5}
    left.start('llama_tiny', 0.0)
    left.reached(0.0, 30.0)
    assert left.text() == 'estimating the time left'
    left.reached(0.5, 70.0)
    left.reached(0.5, 1000.0)
    # (0.5 + 2 + 1.5) FLOPs at 80 s each, and two starts of 30 s: 380 s.
    assert left.text() == 'about 6 min left'
    left.reached(1.0, 1040.0)
    left.end(1130.0)
    left.start('loop_x4_tiny', 1130.0)
    # From 30 to 1040 are batches, with an evaluation between two of them. The other 120 s are outside.
    # 3.5 FLOPs at 1010 s each, and 120 s for each of two runs: 3775 s.
    assert left.text() == 'about 63 min left'
