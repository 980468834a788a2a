"""Trainings through Composer: ranks, microbatches, resumption, and the loss under both rules (facts 5, 8 and 9).

Several ranks run as forks over gloo; FSDP is FSDP2, the one that runs on a CPU.
"""

from contextlib import contextmanager

import pytest
import torch
from common.composer_runs import GLOBAL_BATCH, ITT, SHAPE, SHARDED, train
from common.ranks import run_on_ranks
from composer.core import Callback
from llmfoundry.metrics import LanguageCrossEntropy

from itt_composer.callbacks import causal_gap
from itt_composer.callbacks.causal_gap import CausalGap
from itt_composer.training.threshold_commit import ThresholdCommit

RULES = ('top_k', 'threshold')
FAMILIES = {
    'loop': dict(SHAPE, thinking='loop', thinking_steps=2),
    'blocks': dict(ITT, thinking_steps=1, num_hidden_layers=3, thinking_layers=[[1, 2]]),
}
# Blocks compiled, without the minutes that a C++ compiler takes; the loss in chunks, since no metric needs logits.
COMPILED = dict(compile_blocks='aot_eager', use_train_metrics=False, loss_chunk_tokens=7)


class OutOfMemory(Callback):
    """The first attempt at the second batch runs out of memory, in its second microbatch of 4.

    Attributes:
        microbatches: of the attempts at the second batch.
    """

    def fit_start(self, state, logger):
        # Composer refuses it without a GPU.
        state.auto_microbatching = True
        self.microbatches = 0

    def before_forward(self, state, logger):
        self.microbatches += state.timestamp.batch == 1
        if self.microbatches == 2 and state.device_train_microbatch_size == 4:
            raise RuntimeError('CUDA out of memory')


def short(selection='top_k', **how):
    return train(dict(ITT, selection=selection, router_initializer_range=0.2), duration='4ba', **how)


@pytest.fixture(scope='module')
def alone():
    """One rank: a run for each family, one for each rule, and the same in microbatches of 4 and 1."""

    def runs(selection):
        return short(selection), *(short(selection, microbatch=m, callbacks=[ThresholdCommit()]) for m in (4, 1))

    def all_runs():
        families = {family: train(options, duration='4ba') for family, options in FAMILIES.items()}
        return {**families, **{selection: runs(selection) for selection in RULES}}

    return run_on_ranks(1, all_runs)[0]


@pytest.fixture(scope='module')
def two_ranks():
    """A run for each family and rule under FSDP, and one under DDP; the family blocks without checkpointing."""

    def runs():
        how = dict(fsdp=SHARDED, microbatch=2)
        unwrapped = dict(how, fsdp=SHARDED | {'activation_checkpointing': False})
        return {
            'ddp': short(),
            **{rule: short(rule, **how) for rule in RULES},
            'loop': train(FAMILIES['loop'], duration='4ba', **how),
            'blocks': train(FAMILIES['blocks'] | COMPILED, duration='4ba', **unwrapped),
        }

    return run_on_ranks(2, runs)


@pytest.mark.parametrize('selection', RULES)
def test_ranks_and_microbatches_change_nothing(selection, alone, two_ranks):
    """Facts 5 and 9: loss, gradient norm and thresholds of one rank, of its microbatches, and of two FSDP2 ranks."""
    one, *microbatches = alone[selection]
    for ranks in (*([run] for run in microbatches), [rank[selection] for rank in two_ranks]):
        losses = [sum(both) / len(ranks) for both in zip(*(run.losses for run in ranks), strict=True)]
        assert losses == pytest.approx(one.losses, abs=2e-5)
        for run in ranks:
            assert run.gradient_norms == pytest.approx(one.gradient_norms, rel=1e-3)
            torch.testing.assert_close(torch.tensor(run.thresholds), torch.tensor(one.thresholds), rtol=1e-3, atol=1e-5)
            assert run.updates == one.updates == [4, 4]


@pytest.mark.parametrize(('family', 'units'), [('loop', 5), ('blocks', 3)])
def test_two_fsdp_ranks_give_the_loss_of_one(family, units, alone, two_ranks):
    """Fact 9, with activation checkpointing or compiled blocks on the two ranks and neither on the one."""
    ranks, expected = [rank[family] for rank in two_ranks], alone[family].losses
    assert [run.sharded for run in ranks] == [units] * 2, 'each layer as one unit, or each block, and the root'
    averaged = [sum(both) / 2 for both in zip(*(run.losses for run in ranks), strict=True)]
    assert averaged == pytest.approx(expected, abs=2e-5)
    assert expected[-1] < expected[0]


def test_a_killed_two_rank_run_resumes_to_the_same_loss(two_ranks, tmp_path):
    """Fact 8, for a sharded run: killed after its first checkpoint, it ends as the undisturbed one does."""
    sharded = dict(folder=tmp_path, fsdp=SHARDED, microbatch=2)
    with pytest.raises(AssertionError, match='died without a word'):
        run_on_ranks(2, lambda: short(**sharded, die_at=3))
    for resumed, rank in zip(run_on_ranks(2, lambda: short(**sharded)), two_ranks, strict=True):
        undisturbed = rank['top_k']
        assert resumed.losses == undisturbed.losses[2:]
        assert resumed[2:4] == undisturbed[2:4], 'thresholds and their updates'


def test_an_attempt_that_runs_out_of_memory_does_not_count():
    """Composer tries the batch again in smaller microbatches."""
    out_of_memory = OutOfMemory()
    with pytest.warns(RuntimeWarning, match='Train microbatch size will be decreased from 4'):
        disturbed = train(ITT, duration='2ba', microbatch=4, callbacks=[out_of_memory, ThresholdCommit()])
    assert out_of_memory.microbatches == 2 + GLOBAL_BATCH // 2
    undisturbed = train(ITT, duration='2ba', microbatch=2, callbacks=[ThresholdCommit()])
    thresholds = torch.tensor(disturbed.thresholds)
    torch.testing.assert_close(thresholds, torch.tensor(undisturbed.thresholds), rtol=1e-3, atol=1e-5)


def test_ddp_ranks_have_the_thresholds_of_the_whole_batch(alone, two_ranks):
    one, first, second = (run.thresholds for run in (alone['top_k'][0], *(rank['ddp'] for rank in two_ranks)))
    assert first == second
    torch.testing.assert_close(torch.tensor(first), torch.tensor(one), rtol=1e-3, atol=1e-5)


def test_a_batch_without_a_change_of_the_routers_counts_too():
    """As the first of a warm-up whose learning rate starts at zero; only the callback can know where it ends."""
    assert train(ITT, lr=0.0, duration='2ba', callbacks=[ThresholdCommit()]).updates == [2, 2]
    assert train(ITT, lr=0.0, duration='2ba').updates == [1, 1]


def test_losses_are_summed_in_the_precision_of_the_training(monkeypatch):
    """As Composer sums its own metrics: without the context, losses of bfloat16 logits are rounded to 8 bits."""
    inside, sums = [], []

    @contextmanager
    def context(*_):
        inside.append(True)
        yield
        inside.pop()

    class Metric(LanguageCrossEntropy):
        def update(self, *arguments):
            sums.append(bool(inside))
            super().update(*arguments)

    monkeypatch.setattr(causal_gap, 'get_precision_context', context)
    monkeypatch.setattr(causal_gap, 'LanguageCrossEntropy', Metric)
    train(ITT, evaluate=True, duration='3ba', callbacks=[CausalGap()])
    assert sums and all(sums)


def test_evaluation_reports_both_rules():
    """The causal loss is the one that foundry's own metric has; the gap is what the other rule makes of it."""
    logged = train(ITT, evaluate=True, duration='3ba', callbacks=[CausalGap()]).logged
    causal, ahead = logged['causal_gap/rows/cross_entropy_threshold'], logged['causal_gap/rows/cross_entropy_top_k']
    torch.testing.assert_close(logged['metrics/rows/LanguageCrossEntropy'], causal)
    assert causal != ahead
    assert logged['causal_gap/rows/gap'] == causal - ahead
