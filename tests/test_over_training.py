"""What the figures read of a run: its model's family and its TensorBoard curves."""

from __future__ import annotations

import pytest
from common import small_models
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from itt_composer.analysis.tensorboard import RunLogs
from itt_composer.export.load import as_ours, as_routed
from research.figures.over_training import read_training


def test_models_of_another_kind_are_named():
    shape = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r'some/folder: .* is of the family gpt_neox; supported are llama, '):
        as_ours(GPTNeoXForCausalLM(GPTNeoXConfig(**shape)), 'some/folder')
    with pytest.raises(ValueError, match='some/folder: expected a model that routes tokens, got thinking: loop'):
        as_routed(small_models.build(thinking='loop', thinking_steps=2), 'some/folder')


def test_curves_of_a_run(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for batch in range(401):
            writer.add_scalar('router/layer2/step2/gate_q50', batch / 10, batch)
            writer.add_scalar('loss/train/total', 1.0, batch)
        writer.add_scalar('step_encoding/layer0/step0/mean', 1.0, 5)
    router = read_training(tmp_path, 'router')
    assert len(router) == 134 and router['batch'].iloc[1] == 3 and router['value'].iloc[1] == pytest.approx(0.3)
    assert set(router['layer']) == {2} and set(router['step']) == {2} and set(router['quantity']) == {'gate_q50'}
    assert read_training(tmp_path, 'step_encoding')['value'].tolist() == [1.0]
    with pytest.raises(ValueError, match='no TensorBoard files'):
        read_training(tmp_path / 'none', 'router')


def test_a_run_without_the_callback_is_named(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar('step_encoding/layer0/step0/mean', 1.0, 5)
    with pytest.raises(ValueError, match='no router/layer<n>/step<t> scalars; train with the callback router_weights'):
        read_training(tmp_path, 'router')


def test_curves_come_by_name_however_they_were_logged(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for domain in ('wiki', 'arxiv', 'cc'):
            writer.add_scalar(f'metrics/eval/{domain}/LanguageCrossEntropy', 1.0, 5)
    assert list(RunLogs(tmp_path).domain_losses()) == ['arxiv', 'cc', 'wiki']
