"""Dynamic batch loading: the update, the rows that are really drawn, and resuming."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from common.ranks import run_on_ranks
from common.shards import write_data
from common.tiny_runs import BATCH, S, fit, parameters, tiny_model, trainer
from composer import Callback, Evaluator
from composer.callbacks import CheckpointSaver
from composer.utils import dist
from llmfoundry.data.text_data import build_text_dataloader
from streaming import MDSWriter
from streaming.base.util import clean_stale_shared_memory
from torch.distributed import checkpoint
from transformers import AutoTokenizer

from itt_composer.callbacks.dynamic_batch_loading import DynamicBatchLoading, update_weights

# Domain k's tokens are from 16k on, so that a row tells where it comes from; the first is the easiest to learn.
TOKENS_OF = {'easy': 1, 'middle': 4, 'hard': 16}
START = {'easy': 0.5, 'middle': 0.3, 'hard': 0.2}
TARGETS = {'easy': 3.0, 'middle': 3.5, 'hard': 3.0}
EPOCH_ROWS = 24
EPOCH = EPOCH_ROWS // BATCH


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp('data'), {}, {})
    generator = np.random.default_rng(0)
    for split, rows in (('train', 40), ('validation', 4)):
        for k, (domain, tokens) in enumerate(TOKENS_OF.items()):
            with MDSWriter(out=str(folder / split / domain), columns={'tokens': f'ndarray:uint16:{S}'}) as writer:
                for _ in range(rows):
                    writer.write({'tokens': (16 * k + generator.integers(0, tokens, S)).astype(np.uint16)})
    return folder


def loader(data, dataset, workers=0, persistent_workers=False):
    return build_text_dataloader(
        AutoTokenizer.from_pretrained(data / 'tokenizer'),
        device_batch_size=BATCH // dist.get_world_size(),
        dataset={'max_seq_len': S, 'num_canonical_nodes': 2, **dataset},
        drop_last=True,
        num_workers=workers,
        pin_memory=False,
        prefetch_factor=2 if workers else None,
        persistent_workers=persistent_workers,
    )


def streams(data, domains=START):
    return {d: {'local': str(data / 'train' / d), 'proportion': START[d]} for d in domains}


class Drawn(Callback):
    """The domain of every row, batch by batch."""

    def __init__(self):
        self.rows = []

    def batch_start(self, state, logger):
        self.rows.append((state.batch['input_ids'][:, 0] // 16).tolist())


def options(data, workers=0, epoch_size=EPOCH_ROWS, measured=START, persistent_workers=False):
    # As foundry's: shared memory of runs before is not theirs.
    clean_stale_shared_memory()
    train = {'streams': streams(data), 'epoch_size': epoch_size, 'shuffle': True}
    return {
        'train_dataloader': loader(data, train, workers, persistent_workers),
        'eval_dataloader': [
            Evaluator(
                label=f'eval/{domain}',
                dataloader=loader(data, {'local': str(data / 'validation' / domain)}),
                metric_names=['LanguageCrossEntropy'],
            )
            for domain in measured
        ],
        'eval_interval': '1ep',
        'max_duration': f'{3 * EPOCH}ba',
        'microbatch': 1,
    }


def train(data, folder=None, load_path=None, workers=0):
    model, drawn = tiny_model(), Drawn()
    savers = [CheckpointSaver(str(folder), save_interval=interval) for interval in ('4ba', '1ep')] if folder else []
    logged = fit(model, [DynamicBatchLoading(TARGETS), drawn, *savers], load_path=load_path, **options(data, workers))
    return logged, drawn.rows, parameters(model)


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoints')
    return folder, train(data, folder, workers=2)


def series(logged, kind):
    return {d: [value for _, value in logged[f'dynamic_batch_loading/{kind}/{d}']] for d in START}


def check_shares(rows, weights):
    """Each epoch's rows are divided by its weights, to the last row."""
    for epoch in range(3):
        found = Counter(k for batch in rows[epoch * EPOCH : (epoch + 1) * EPOCH] for k in batch)
        assert found.total() == EPOCH_ROWS
        for k, domain in enumerate(START):
            assert abs(found[k] - EPOCH_ROWS * weights[domain][epoch]) < 1, (epoch, domain)


def test_update_against_numbers():
    w_K = update_weights(np.array([0.67, 0.15, 0.18]), np.array([0.2, -0.5, 0.1]))
    alpha = [0.67 * 1.2214027581601699, 0.15, 0.18 * 1.1051709180756477]
    assert w_K.tolist() == pytest.approx([a / sum(alpha) for a in alpha], rel=1e-14)
    assert update_weights(np.array([0.7, 0.3]), np.array([-1.0, 0.0])).tolist() == pytest.approx([0.7, 0.3])
    assert update_weights(np.array([0.5, 0.5]), np.array([2000.0, 0.0])).tolist() == [1, 0]


def test_its_state_comes_back_from_a_sharded_checkpoint(tmp_path):
    """Which looks for the keys that a callback has before it is loaded."""
    saved, fresh = DynamicBatchLoading(TARGETS), DynamicBatchLoading(TARGETS)
    saved.weights, saved._losses = dict(START), {domain: 2.5 for domain in START}
    checkpoint.save({'callback': saved.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    state = {'callback': fresh.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    fresh.load_state_dict(state['callback'])
    assert (fresh.weights, fresh._losses) == (saved.weights, saved._losses)


def test_weights_follow_the_losses_and_the_rows_follow_the_weights(undisturbed):
    logged, rows, _ = undisturbed[1]
    weights, gaps = series(logged, 'weight'), series(logged, 'gap')
    expected = START
    for epoch in (0, 1):
        losses = {d: logged[f'metrics/eval/{d}/LanguageCrossEntropy'][epoch][1] for d in START}
        for domain in START:
            assert weights[domain][epoch] == pytest.approx(expected[domain], abs=1e-12)
            assert gaps[domain][epoch] == pytest.approx(float(losses[domain]) - TARGETS[domain], abs=1e-6)
        alpha = {d: expected[d] * math.exp(max(float(losses[d]) - TARGETS[d], 0)) for d in START}
        expected = {d: a / sum(alpha.values()) for d, a in alpha.items()}
    assert {d: weights[d][2] for d in START} == pytest.approx(expected, abs=1e-6)
    assert [batch for batch, _ in logged['dynamic_batch_loading/weight/hard']] == [0, EPOCH, 2 * EPOCH]
    assert weights['hard'][2] > START['hard'] + 2 / EPOCH_ROWS, 'the test would not see whether rows follow'
    check_shares(rows, weights)


@pytest.mark.parametrize('checkpoint', ['ep1-ba8', 'ep1-ba12', 'ep2-ba12'])
def test_resumed_equals_undisturbed(data, undisturbed, checkpoint):
    """In the middle of an epoch, at its last batch with the evaluation still to come, and between two epochs."""
    folder, (whole, whole_rows, whole_parameters) = undisturbed
    workers = 2 if checkpoint == 'ep1-ba8' else 0
    logged, rows, resumed_parameters = train(data, load_path=str(folder / f'{checkpoint}-rank0.pt'), workers=workers)
    start = int(checkpoint.split('ba')[1])
    assert rows == whole_rows[start:]
    assert torch.equal(resumed_parameters, whole_parameters)
    for name in [f'dynamic_batch_loading/{k}/{d}' for k in ('weight', 'gap') for d in START] + ['loss/train/total']:
        assert logged.get(name, []) == [(batch, value) for batch, value in whole[name] if batch >= start], name


def weights_and_rows(data):
    logged, rows, _ = train(data)
    return series(logged, 'weight'), rows


def test_two_ranks_draw_the_same_shares(data):
    (weights, rows), (second_weights, second_rows) = run_on_ranks(2, weights_and_rows, data)
    assert weights == second_weights
    check_shares([a + b for a, b in zip(rows, second_rows, strict=True)], weights)


@pytest.mark.parametrize(
    ('targets', 'changed', 'message'),
    [
        (TARGETS | {'hrad': 1.0}, {}, r"targets: 'hrad' is not one of .*easy, middle, hard.*did you mean 'hard'"),
        ({'easy': 1.0}, {}, 'targets: missing for middle, hard'),
        (TARGETS, {'measured': ['easy', 'middle']}, 'no evaluation set with LanguageCrossEntropy for hard'),
        (TARGETS, {'epoch_size': 3 * EPOCH_ROWS}, r'only one; set train_loader\.dataset\.epoch_size'),
        (TARGETS, {'workers': 1, 'persistent_workers': True}, r'set train_loader\.persistent_workers=false'),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_first_batch(data, targets, changed, message):
    drawn = Drawn()
    run = trainer(tiny_model(), [DynamicBatchLoading(targets), drawn], **options(data, **changed))
    with pytest.raises(ValueError, match=message):
        run.fit()
    assert not drawn.rows


def test_a_loader_without_streams_is_refused():
    with pytest.raises(ValueError, match='the train loader has no streams'):
        trainer(tiny_model(), [DynamicBatchLoading(TARGETS)]).fit()


def test_targets_from_a_file_and_bad_ones(tmp_path):
    file = tmp_path / 'targets.yaml'
    file.write_text('easy: 2\nhard: 3.5\n')
    assert DynamicBatchLoading(str(file)).targets == {'easy': 2.0, 'hard': 3.5}
    for bad, message in (
        *((none, f'expected a mapping of domain to loss, or a file with one, got {none}') for none in (None, {})),
        ('', 'no file .; pass a file of domain: loss'),
        ({'easy': 'low'}, "easy: expected a loss in nats per token, got 'low'"),
        ({'easy': math.nan}, 'easy: expected a loss in nats per token, got nan'),
        (str(tmp_path / 'none.yaml'), r'no file .*none\.yaml'),
    ):
        with pytest.raises(ValueError, match=message):
            DynamicBatchLoading(bad)
    file.write_text('{')
    with pytest.raises(ValueError, match=r'targets\.yaml'):
        DynamicBatchLoading(str(file))
