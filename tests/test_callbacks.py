"""What each callback measures, against NumPy or by hand."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common.tiny_runs import BATCH, Images, S, batches, fit, tiny_model, trainer
from composer import Callback, Evaluator
from composer.algorithms import GradientClipping
from composer.loggers import Logger, TensorboardLogger
from matplotlib.figure import Figure
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from itt_composer.analysis.attention_gradients import attention_projections
from itt_composer.analysis.router_weights import RoutedTokens
from itt_composer.analysis.step_encodings import step_encodings
from itt_composer.callbacks.domain_mean import DomainMean
from itt_composer.callbacks.gradient_nuclear_norm import GradientNuclearNorm, gradient_nuclear_norms
from itt_composer.callbacks.pictures import log_histogram
from itt_composer.callbacks.router_weights import RouterWeights, summarise
from itt_composer.callbacks.step_encodings import StepEncodings
from itt_composer.model import routing_state, thinking_layers

# Router weights


def test_summary_against_numpy():
    gate_N = np.random.default_rng(0).random(101, dtype=np.float32)
    summary = summarise(RoutedTokens(gate_N, gate_N > 0.7, threshold=0.25))
    ranked = np.sort(gate_N)
    assert summary == pytest.approx(
        {
            'gate_mean': gate_N.sum() / 101,
            'gate_q05': ranked[5],
            'gate_q25': ranked[25],
            'gate_q50': ranked[50],
            'gate_q75': ranked[75],
            'gate_q95': ranked[95],
            'fraction_routed': (gate_N > 0.7).sum() / 101,
            'threshold': 0.25,
        }
    )


def test_router_weights_are_those_of_the_whole_batch():
    logged = fit(tiny_model(), [RouterWeights('100ba')], max_duration='1ba')

    model, rows = tiny_model(), batches()[:BATCH]
    with model.model.routing.recording() as records:
        model.model(input_ids=torch.stack([row['input_ids'] for row in rows]))
    assert [(record.layer, record.step) for record in records] == [(0, 1), (0, 2), (2, 1), (2, 2)]
    for record in records:
        name, gate = f'router/layer{record.layer}/step{record.step}', record.gate_BS.detach()
        assert logged[f'{name}/gate_mean'] == [(0, pytest.approx(gate.mean().item()))]
        assert logged[f'{name}/gate_q95'] == [(0, pytest.approx(np.quantile(gate.numpy(), 0.95), rel=1e-5))]
        assert logged[f'{name}/fraction_routed'] == [(0, model.model.routing.capacity_T[record.step - 1])]


def test_router_weights_at_the_interval_and_at_the_end_and_nowhere_else():
    model, records = tiny_model(), []

    class Watch(Callback):
        def after_forward(self, state, logger):
            records.append(routing_state(state.model).records)

    images = Images()
    logged = fit(model, [RouterWeights('3ba', '6ba'), Watch()], loggers=[images])
    assert [batch for batch, _ in logged['router/layer0/step1/gate_mean']] == [0, 3, 6, 7]
    assert set(map(str, records)) == {'None'}
    assert [step for step, _ in images.images['router/gate_values']] == [0, 6, 7]


class StopError(Exception):
    pass


def test_recording_is_off_after_a_training_that_breaks_in_the_forward_pass():
    model = tiny_model()

    def stop(*_):
        assert model.model.routing.records is not None
        raise StopError

    model.model.model.norm.register_forward_hook(stop)
    run = trainer(model, [RouterWeights()])
    with pytest.raises(StopError):
        run.fit()
    run.close()
    assert model.model.routing.records is None


def test_a_recomputed_forward_pass_is_not_recorded_twice(monkeypatch):
    module = importlib.import_module('itt_composer.callbacks.router_weights')
    sizes = []

    def tokens_by_step(table):
        return table.groupby(['layer', 'step'])[['routed', 'not_routed']].sum().sum(axis=1)

    monkeypatch.setattr(module, 'plot_router_weights', lambda table: sizes.extend(tokens_by_step(table)) or Figure())
    model = tiny_model()
    layers = list(thinking_layers(model).values())
    apply_activation_checkpointing(model.model, check_fn=lambda m: m in layers)
    fit(model, [RouterWeights()], max_duration='1ba', loggers=[Images()])
    assert sizes == [BATCH * S] * 4


def test_histograms_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tiny_model(), [RouterWeights('4ba', '4ba')], loggers=[TensorboardLogger(log_dir=str(tmp_path))], run_name='r')
    events = EventAccumulator(str(tmp_path / 'r'), size_guidance={'histograms': 0, 'images': 0})
    events.Reload()
    histogram = events.Histograms('router/layer2/step2/gate')
    assert [event.step for event in histogram] == [0, 4, 7]
    assert histogram[0].histogram_value.num == BATCH * S
    assert [event.step for event in events.Images('router/gate_values')] == [0, 4, 7]


def test_gate_values_that_are_not_finite_do_not_stop_the_training_and_are_said_once(tmp_path, caplog):
    model = tiny_model()
    thinking_layers(model)[0].router_TD.data.fill_(float('nan'))
    logs = TensorboardLogger(log_dir=str(tmp_path))
    logged = fit(model, [RouterWeights('1ba', '1ba'), StepEncodings('1ba', '1ba')], loggers=[logs], max_duration='3ba')
    assert math.isnan(logged['router/layer0/step1/gate_mean'][-1][1])
    said = 'router/layer0/step1/gate: expected finite values, got inf or NaN'
    assert caplog.text.count(said) == 1


# Step encodings


def test_step_encodings_are_the_models(tmp_path):
    model = tiny_model()
    images = Images()
    logged = fit(model, [StepEncodings('3ba', '6ba')], loggers=[images])
    for index, layer in thinking_layers(model).items():
        phi_TD = layer.phi_TD.detach().numpy()
        assert not np.allclose(phi_TD, 1)
        for t in range(3):
            series = logged[f'step_encoding/layer{index}/step{t}/mean']
            assert [batch for batch, _ in series] == [1, 3, 6, 8]
            assert series[-1][1] == pytest.approx(phi_TD[t].mean(), rel=1e-5)
            norm = logged[f'step_encoding/layer{index}/step{t}/norm'][-1][1]
            assert norm == pytest.approx(np.sqrt((phi_TD[t] ** 2).sum()), rel=1e-5)
    assert [step for step, _ in images.images['step_encoding/means']] == [1, 6, 8]
    assert {number: phi.shape for number, phi in step_encodings(model).items()} == {0: (3, 16), 2: (3, 16)}


# Gradient nuclear norm


class UnusedScaler(Callback):
    """What Composer has on a GPU at every precision: a scaler, of which only float16 makes use."""

    def batch_start(self, state, logger):
        state.scaler = torch.amp.GradScaler('cpu')
        assert state.scaler.get_scale() > 1


@pytest.mark.parametrize('thinking', ['none', 'loop', 'itt'])
def test_gradient_norm_is_the_whole_batchs_before_clipping(thinking):
    keys = {'thinking': thinking} | ({} if thinking == 'itt' else {'token_ratios': None})
    parts = [UnusedScaler(), GradientNuclearNorm(), GradientClipping(clipping_type='norm', clipping_threshold=1e-4)]
    logged = fit(tiny_model(**keys), parts, max_duration='1ba', microbatch=1)

    model = tiny_model(**keys)
    tokens = torch.stack([row['input_ids'] for row in batches()[:BATCH]])
    model.model(input_ids=tokens, labels=tokens).loss.backward()
    for i, layer in enumerate(model.model.model.layers):
        attention = (layer.block if hasattr(layer, 'block') else layer).self_attn
        for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
            gradient = getattr(attention, name).weight.grad.double().numpy()
            expected = np.linalg.norm(gradient, 'nuc')
            assert expected > 0
            assert logged[f'gradient_nuclear_norm/layer{i}/{name}'] == [(0, pytest.approx(expected, rel=1e-3))]


def test_gpt2_projections_and_norms():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    tokens = torch.randint(32, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    norms = gradient_nuclear_norms(torch.nn.Sequential(model))  # inside a wrapper
    assert set(norms) == {(layer, f'{part}_proj') for layer in (0, 1) for part in 'qkvo'}
    for i, block in enumerate(model.transformer.h):
        joint = block.attn.c_attn.weight.grad.numpy()
        for j, part in enumerate('qkv'):
            expected = np.linalg.norm(joint[:, 16 * j : 16 * (j + 1)], 'nuc')
            assert norms[i, f'{part}_proj'] == pytest.approx(expected, rel=1e-4)
        assert norms[i, 'o_proj'] == pytest.approx(
            np.linalg.norm(block.attn.c_proj.weight.grad.numpy(), 'nuc'), rel=1e-4
        )


def test_projections_by_name_not_those_of_the_mlp_or_cross_attention():
    model = torch.nn.Module()
    for name in (
        'model.layers.0.self_attn.q_proj',
        '_orig_mod.model.layers.1._fsdp_wrapped_module.block._checkpoint_wrapped_module.self_attn.o_proj',
        'model.layers.2._fsdp_wrapped_module.block.3.self_attn.v_proj',
        'model.layers.1.mlp.gate_proj',
        'decoder.layers.0.encoder_attn.q_proj',
        'h.0.mlp.c_proj',
    ):
        parent = model
        for child in name.split('.'):
            if not hasattr(parent, child):
                parent.add_module(child, torch.nn.Module())
            parent = getattr(parent, child)
    assert set(attention_projections(model)) == {(0, 'q_proj'), (1, 'o_proj'), (3, 'v_proj')}


def test_a_model_without_known_attention_is_refused():
    state = SimpleNamespace(model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match='gradient_nuclear_norm: no attention projections found'):
        GradientNuclearNorm().init(state, None)


def test_a_gradient_that_is_not_finite_is_nan_not_an_error():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    assert all(math.isnan(norm) for norm in gradient_nuclear_norms(model).values())


def test_a_histogram_has_the_finite_values(tmp_path):
    """TensorBoard fails at one without any."""
    logger = Logger(SimpleNamespace(), [tensorboard := TensorboardLogger(str(tmp_path))])
    tensorboard.writer, given = SimpleNamespace(add_histogram=lambda _, values, **__: given.append(list(values))), []
    for values in ([1.0, float('nan'), 2.0], [float('nan')]):
        log_histogram(logger, 'weights', np.array(values), 0)
    assert given == [[1.0, 2.0]]


# Mean over domains


def test_the_mean_over_domains_gives_each_the_same_weight():
    """Two domains of unlike size, and the merged set, which is none of them."""
    rows = batches(4)
    sets = {'small': rows[:4], 'large': rows[4:], 'merged': rows}
    names = ['LanguageCrossEntropy']
    evaluators = [
        Evaluator(label=f'eval/{n}', dataloader=DataLoader(r, batch_size=4), metric_names=names)
        for n, r in sets.items()
    ]
    options = dict(eval_dataloader=evaluators, eval_interval='2ba', max_duration='4ba')
    logged = fit(tiny_model(), [DomainMean(['small', 'large'])], **options)
    small, large, merged = (logged[f'metrics/eval/{name}/LanguageCrossEntropy'] for name in sets)
    mean = logged['metrics/eval_domain_mean/LanguageCrossEntropy']
    assert [batch for batch, _ in mean] == [2, 4]
    for (_, a), (_, b), (_, both), (_, value) in zip(small, large, merged, mean, strict=True):
        assert float(value) == pytest.approx((float(a) + float(b)) / 2, abs=1e-6)
        assert float(both) == pytest.approx((float(a) + 3 * float(b)) / 4, abs=1e-5)
