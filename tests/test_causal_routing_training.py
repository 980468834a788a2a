"""Threshold routing in a training through Composer: ranks, microbatches, and the loss under both rules."""

from contextlib import contextmanager

import pytest
import torch
from common.composer_runs import ITT, train
from common.ranks import run_on_ranks
from llmfoundry.metrics import LanguageCrossEntropy

from itt_composer.callbacks import causal_gap
from itt_composer.callbacks.causal_gap import CausalGap
from itt_composer.training.threshold_commit import ThresholdCommit


@pytest.mark.parametrize('selection', ['top_k', 'threshold'])
def test_ranks_and_microbatches_change_nothing(selection):
    """Facts 5 and 9: loss, gradient norm and thresholds of one rank, of its microbatches, and of two FSDP2 ranks."""
    options = dict(ITT, selection=selection, router_initializer_range=0.2)
    fsdp = {'activation_checkpointing': True, 'state_dict_type': 'sharded'}
    (one,) = run_on_ranks(1, train, options)
    runs = [run_on_ranks(1, lambda m=m: train(options, microbatch=m, callbacks=[ThresholdCommit()])) for m in (4, 1)]
    runs.append(run_on_ranks(2, train, options, None, fsdp, 2))
    for ranks in runs:
        losses = [sum(both) / len(ranks) for both in zip(*(run.losses for run in ranks), strict=True)]
        assert losses == pytest.approx(one.losses, abs=2e-5)
        for run in ranks:
            assert run.gradient_norms == pytest.approx(one.gradient_norms, rel=1e-3)
            torch.testing.assert_close(torch.tensor(run.thresholds), torch.tensor(one.thresholds), rtol=1e-3, atol=1e-5)
            assert run.updates == one.updates == [6, 6]


def test_ddp_ranks_have_the_thresholds_of_the_whole_batch():
    (one,), two = run_on_ranks(1, train, ITT), run_on_ranks(2, train, ITT)
    assert two[0].thresholds == two[1].thresholds
    torch.testing.assert_close(torch.tensor(two[0].thresholds), torch.tensor(one.thresholds), rtol=1e-3, atol=1e-5)


def test_a_batch_without_a_change_of_the_routers_counts_too():
    """As the first of a warm-up whose learning rate starts at zero; only the callback can know where it ends."""
    assert train(ITT, lr=0.0, callbacks=[ThresholdCommit()]).updates == [6, 6]
    assert train(ITT, lr=0.0).updates == [1, 1]


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
    train(ITT, evaluate=True, callbacks=[CausalGap()])
    assert sums and all(sums)


def test_evaluation_reports_both_rules():
    """The causal loss is the one that foundry's own metric has; the gap is what the other rule makes of it."""
    logged = train(ITT, evaluate=True, callbacks=[CausalGap()]).logged
    causal, ahead = logged['causal_gap/rows/cross_entropy_threshold'], logged['causal_gap/rows/cross_entropy_top_k']
    torch.testing.assert_close(logged['metrics/rows/LanguageCrossEntropy'], causal)
    assert causal != ahead
    assert logged['causal_gap/rows/gap'] == causal - ahead
