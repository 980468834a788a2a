"""The ``threshold`` rule in a training: averaged over ranks, saved and resumed, and the loss under both rules."""

from contextlib import contextmanager

import test_composer_model as training
import torch
from common.ranks import run_on_ranks, use_fsdp2_over_gloo
from composer import Trainer
from composer.core import Callback, Evaluator
from composer.loggers import InMemoryLogger
from composer.optim import DecoupledAdamW
from composer.utils import dist
from llmfoundry.metrics import LanguageCrossEntropy

from itt_composer.callbacks.causal_gap import CausalGap, causal_gap
from itt_composer.model import thinking_layers
from itt_composer.training.composer_model import ComposerITTForCausalLM
from itt_composer.training.threshold_commit import ThresholdAverage


class Spy(Callback):
    """Each rank's own thresholds before the average, and those that everybody has once a batch is over."""

    def __init__(self):
        self.own, self.shared = [], []

    def after_train_batch(self, state, logger):
        self.own.append(thresholds(state.model))

    def batch_checkpoint(self, state, logger):
        self.shared.append(thresholds(state.model))


def thresholds(model):
    return torch.stack([layer.threshold_T for layer in thinking_layers(model).values()]).tolist()


def train(folder=None, fsdp=None, duration='4ba', resume=False, evaluate=False):
    """Train for a little; the spy, the thresholds at the end, and what was logged."""
    torch.manual_seed(11)
    model = ComposerITTForCausalLM(**training.ITT)
    if fsdp is not None:
        use_fsdp2_over_gloo()
    spy, memory = Spy(), InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=training.batches(),
        eval_dataloader=Evaluator(label='rows', dataloader=training.batches(), metric_names=['LanguageCrossEntropy'])
        if evaluate
        else None,
        optimizers=DecoupledAdamW(model.parameters(), lr=3e-3),
        max_duration=duration,
        callbacks=[spy, *([CausalGap()] if evaluate else [])],
        loggers=[memory],
        parallelism_config={'fsdp': fsdp} if fsdp is not None else None,
        device='cpu',
        precision='fp32',
        seed=3,
        progress_bar=False,
        run_name='test',
        save_folder=None if folder is None else str(folder),
        save_interval='2ba',
        autoresume=resume,
    )
    averages = sum(isinstance(callback, ThresholdAverage) for callback in trainer.state.callbacks)
    trainer.fit()
    updates = [int(layer.threshold_updates) for layer in thinking_layers(trainer.state.model).values()]
    end = thresholds(trainer.state.model)
    trainer.close()
    logged = {
        key: float(values[-1][1]) for key, values in memory.data.items() if key.startswith(('causal_gap', 'metrics'))
    }
    return dict(own=spy.own, shared=spy.shared, end=end, updates=updates, averages=averages, logged=logged)


def check_average(ranks):
    one, other = ranks
    assert one['averages'] == other['averages'] == 1
    assert one['shared'] == other['shared']
    for mine, theirs, shared in zip(one['own'], other['own'], one['shared'], strict=True):
        assert mine != theirs
        torch.testing.assert_close((torch.tensor(mine) + torch.tensor(theirs)) / 2, torch.tensor(shared))


def test_ranks_share_the_mean_of_their_thresholds():
    """Under DDP, which by itself would give every rank the thresholds of rank 0; the trainer was asked for nothing."""
    assert dist.get_world_size() == 1
    check_average(run_on_ranks(2, train))


def test_sharded_thresholds_are_averaged_saved_and_resumed(tmp_path):
    fsdp = {'state_dict_type': 'sharded'}
    whole = run_on_ranks(2, train, tmp_path / 'whole', fsdp)
    check_average(whole)
    run_on_ranks(2, train, tmp_path / 'parts', fsdp, '2ba')
    resumed = run_on_ranks(2, train, tmp_path / 'parts', fsdp, '4ba', True)
    for rank, again in zip(whole, resumed, strict=True):
        assert len(again['own']) == 2
        assert again['end'] == rank['end']
        assert again['updates'] == rank['updates'] == [4, 4]


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
    train(evaluate=True)
    assert sums and all(sums)


def test_evaluation_reports_both_rules():
    """The causal loss is the one that foundry's own metric has; the gap is what the other rule makes of it."""
    logged = train(evaluate=True)['logged']
    causal, ahead = logged['causal_gap/rows/cross_entropy_threshold'], logged['causal_gap/rows/cross_entropy_top_k']
    torch.testing.assert_close(logged['metrics/rows/LanguageCrossEntropy'], causal)
    assert causal != ahead
    assert logged['causal_gap/rows/gap'] == causal - ahead
