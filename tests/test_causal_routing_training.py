"""Threshold routing in a training through Composer: ranks, microbatches, and the loss under both rules."""

from contextlib import contextmanager

import pytest
import torch
from common.composer_runs import GLOBAL_BATCH, ITT, SHARDED, train
from common.ranks import run_on_ranks
from composer.core import Callback
from llmfoundry.metrics import LanguageCrossEntropy

from itt_composer.callbacks import causal_gap
from itt_composer.callbacks.causal_gap import CausalGap
from itt_composer.model import thinking_layers
from itt_composer.training.threshold_commit import ThresholdCommit

RULES = ('top_k', 'threshold')


class OutOfMemory(Callback):
    """The first attempt at the second batch runs out of memory, in its second microbatch of 4.

    Attributes:
        microbatches: of the attempts at the second batch.
        counts: after each batch, the sequences that its commit takes, for each layer and step.
    """

    def fit_start(self, state, logger):
        # Composer refuses it without a GPU.
        state.auto_microbatching = True
        self.microbatches, self.counts = 0, []

    def before_loss(self, state, logger):
        self.microbatches += state.timestamp.batch == 1
        if self.microbatches == 2 and state.device_train_microbatch_size == 4:
            raise RuntimeError('CUDA out of memory')

    def batch_end(self, state, logger):
        self.counts.append([layer._pending_T2[:, 1].tolist() for layer in thinking_layers(state.model).values()])


def short(selection='top_k', **how):
    return train(dict(ITT, selection=selection, router_initializer_range=0.2), duration='4ba', **how)


@pytest.fixture(scope='module')
def alone():
    """One rank: a run for each rule, and the same in microbatches of 4 and 1."""

    def runs(selection):
        return short(selection), *(short(selection, microbatch=m, callbacks=[ThresholdCommit()]) for m in (4, 1))

    return run_on_ranks(1, lambda: {selection: runs(selection) for selection in RULES})[0]


@pytest.fixture(scope='module')
def two_ranks():
    """A run for each rule under FSDP, and one under DDP."""
    runs = {rule: dict(selection=rule, fsdp=SHARDED, microbatch=2) for rule in RULES}
    return run_on_ranks(2, lambda: {name: short(**how) for name, how in {'ddp': {}, **runs}.items()})


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


def test_an_attempt_that_runs_out_of_memory_does_not_count():
    """Composer tries the batch again in smaller microbatches."""
    out_of_memory = OutOfMemory()
    with pytest.warns(RuntimeWarning, match='Train microbatch size will be decreased from 4'):
        train(ITT, duration='2ba', microbatch=4, callbacks=[out_of_memory, ThresholdCommit()])
    assert out_of_memory.microbatches == 2 + GLOBAL_BATCH // 2
    assert out_of_memory.counts == [[[GLOBAL_BATCH] * 2] * 2] * 2


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
