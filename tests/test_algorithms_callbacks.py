"""Algorithms and callbacks: one train-and-resume test for all, then what each computes, against NumPy or by hand."""

from __future__ import annotations

import importlib
import itertools
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from algorithm_settings import PARTS, TINY_ITT, Part
from composer import Algorithm, Callback, Evaluator, Trainer
from composer.algorithms import GradientClipping
from composer.core import Time, Timestamp
from composer.loggers import InMemoryLogger, LoggerDestination, TensorboardLogger
from composer.utils import dist
from ranks import run_on_ranks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from itt_composer.algorithms.capacity_warmup import CapacityWarmup, apply_capacity, get_capacity
from itt_composer.callbacks.gradient_nuclear_norm import (
    GradientNuclearNorm,
    attention_projections,
    gradient_nuclear_norms,
    plot_gradient_nuclear_norms,
)
from itt_composer.callbacks.router_weights import RoutedTokens, RouterWeights, plot_router_weights, summarise
from itt_composer.callbacks.step_encodings import StepEncodings, plot_step_encodings, step_encodings
from itt_composer.composer_model import ComposerITTForCausalLM
from itt_composer.model import thinking_layers
from itt_composer.trainer_time import Interval, is_last_batch, parse_time, progress, training_length

S, BATCH, BATCHES = 16, 4, 8


class Images(LoggerDestination):
    """Keeps the pictures it is given, as wandb or TensorBoard would."""

    def __init__(self):
        self.images = {}

    def log_images(
        self, images, name='Images', channels_last=False, step=None, masks=None, mask_class_labels=None, use_table=True
    ):
        assert channels_last and not use_table  # wandb hangs over tables
        self.images.setdefault(name, []).append((step, images))


def tiny_model(**keys):
    torch.manual_seed(0)
    return ComposerITTForCausalLM(**{**TINY_ITT, **keys})


def batches(count=BATCHES):
    tokens = torch.randint(64, (count * BATCH, S), generator=torch.Generator().manual_seed(1))
    return [{'input_ids': row, 'labels': row} for row in tokens]


def trainer(model, parts=(), *, max_duration=f'{BATCHES}ba', microbatch=2, loggers=(), **options):
    rows = batches()
    return Trainer(
        model=model,
        train_dataloader=DataLoader(
            rows, batch_size=BATCH // dist.get_world_size(), sampler=dist.get_sampler(rows, shuffle=False)
        ),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration=max_duration,
        device_train_microbatch_size=microbatch,
        algorithms=[part for part in parts if isinstance(part, Algorithm)],
        callbacks=[part for part in parts if isinstance(part, Callback)],
        loggers=list(loggers),
        seed=7,
        progress_bar=False,
        **options,
    )


def fit(model, parts=(), **options):
    """Train, and return what was logged, as {metric: [(batch, value), ...]}."""
    memory = InMemoryLogger()
    run = trainer(model, parts, loggers=[memory, *options.pop('loggers', [])], **options)
    run.fit()
    run.close()
    return {name: [(t.batch.value, value) for t, value in series] for name, series in memory.data.items()}


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fake_state(batch=0, *, max_duration='100ba', epoch_batches=20, tokens_per_batch=64):
    """A trainer's state after ``batch`` batches."""
    now, before = (
        Timestamp(
            epoch=b // epoch_batches,
            batch=b,
            batch_in_epoch=b % epoch_batches,
            sample=4 * b,
            token=tokens_per_batch * b,
        )
        for b in (batch, batch - 1 if batch else 0)
    )
    return SimpleNamespace(
        timestamp=now,
        previous_timestamp=before if batch else None,
        max_duration=Time.from_timestring(max_duration),
        dataloader_len=Time.from_timestring(f'{epoch_batches}ba'),
    )


# One test for every part


@pytest.fixture(scope='module')
def trained_alone():
    model = tiny_model()
    fit(model)
    return parameters(model)


@pytest.mark.parametrize('part', PARTS, ids=lambda part: part.cls.__name__)
def test_trains_and_resumes(part: Part, trained_alone, tmp_path):
    whole_model = tiny_model()
    whole = fit(whole_model, [part.cls(**part.settings)], save_folder=str(tmp_path), save_interval='5ba')
    assert part.metrics <= set(whole)
    # A callback only watches; an algorithm changes the training.
    assert torch.equal(parameters(whole_model), trained_alone) == issubclass(part.cls, Callback)

    resumed_model = tiny_model()
    checkpoint = tmp_path / 'ep0-ba5-rank0.pt'
    resumed = fit(resumed_model, [part.cls(**part.settings)], load_path=str(checkpoint))

    assert torch.equal(parameters(resumed_model), parameters(whole_model))
    for name in part.metrics:
        assert resumed[name] == [(batch, value) for batch, value in whole[name] if batch >= 5], name
    assert resumed['loss/train/total'] == whole['loss/train/total'][5:]


def fit_sharded():
    os.environ['FSDP_VERSION'] = '2'
    # gloo sums where FSDP 2 asks it for the mean.
    collectives = torch.distributed.fsdp._fully_shard._fsdp_collectives
    collectives._get_gradient_divide_factors = lambda *_, **__: (1.0, float(dist.get_world_size()))
    images = Images()
    logged = fit(
        tiny_model(),
        [part.cls(**part.settings) for part in PARTS],
        loggers=[images],
        microbatch=1,
        parallelism_config={'fsdp': {'activation_checkpointing': True, 'state_dict_type': 'sharded'}},
    )
    return logged, set(images.images)


def test_two_fsdp_ranks_log_what_one_logs():
    one, pictures = run_on_ranks(1, fit_sharded)[0]  # at one rank Composer drops the sharding
    (first, first_pictures), (second, second_pictures) = run_on_ranks(2, fit_sharded)
    assert first_pictures == pictures == {'router/weights', 'step_encoding/means', 'gradient_nuclear_norm/layers'}
    assert not second_pictures
    compared = 0
    for name, series in one.items():
        # Quantiles are means of the ranks' own, thresholds follow each rank's own tokens.
        exact = name.startswith(('capacity', 'router_temp', 'step_encoding', 'gradient_nuclear')) or name.endswith(
            ('weight_mean', 'share_chosen')
        )
        if exact:
            compared += 1
            for of_rank in (first, second):
                assert [batch for batch, _ in of_rank[name]] == [batch for batch, _ in series]
                assert [v for _, v in of_rank[name]] == pytest.approx([v for _, v in series], rel=2e-3, abs=1e-6), name
    assert compared == 3 + 4 * 2 + 2 * 3 * 2 + 3 * 4


# Time


@pytest.mark.parametrize('value', ['5', 'soon', '1.5ba', '0ba', '-3ba', '1.5dur', '3600sec', '2iter', 5, None])
def test_bad_times_name_the_setting(value):
    with pytest.raises(ValueError, match=r'capacity_warmup\.duration: '):
        CapacityWarmup(duration=value)


def test_progress_and_length_in_every_unit():
    state = fake_state(30, max_duration='100ba', epoch_batches=20)
    expected = {'ba': (30, 100), 'sp': (120, None), 'tok': (1920, None), 'ep': (1.5, 5), 'dur': (0.3, 1)}
    for unit, (done, length) in expected.items():
        time = parse_time('t', f'1{unit}')
        assert progress(state, time.unit) == pytest.approx(done)
        assert training_length(state, time.unit) == length
    epochs = fake_state(30, max_duration='3ep', epoch_batches=20)
    assert progress(epochs, parse_time('t', '1dur').unit) == pytest.approx(0.5)
    assert training_length(epochs, parse_time('t', '1ba').unit) == 60


@pytest.mark.parametrize(
    ('interval', 'due_at'),
    [
        ('10ba', [0, 10, 20, 30]),
        ('0.1dur', [0, 10, 20, 30]),
        ('1ep', [0, 20]),
        ('640tok', [0, 10, 20, 30]),
        ('100sp', [0, 25]),
    ],
)
def test_interval_also_across_a_resume(interval, due_at):
    straight = Interval('i', interval)
    assert [b for b in range(35) if straight.due(fake_state(b))] == due_at
    for stop in (7, 10, 11, 20):
        before, after = Interval('i', interval), Interval('i', interval)
        first = [b for b in range(stop) if before.due(fake_state(b))]
        after.load_state_dict(before.state_dict())
        assert first + [b for b in range(stop, 35) if after.due(fake_state(b))] == due_at


@pytest.mark.parametrize('max_duration', ['40ba', '2ep', '160sp', '2560tok', '2500tok'])
def test_last_batch(max_duration):
    assert [b for b in range(40) if is_last_batch(fake_state(b, max_duration=max_duration))] == [39]


# capacity_warmup


def test_get_capacity_at_its_marks():
    assert get_capacity(0, 0.5, 0.1) == 0.1
    assert get_capacity(0.25, 0.5, 0.1) == pytest.approx(0.2)
    assert get_capacity(1, 0.5, 0.1) == get_capacity(7, 0.5, 0.1) == 0.5
    assert get_capacity(0.25, 0.5, 0.1, shape='cosine') == pytest.approx(0.1 + 0.4 * (1 - math.cos(math.pi / 4)) / 2)
    assert get_capacity(0.5, 0.3, 0.4) == 0.3  # the ratio is below initial
    grows_on = {'final': 1.0, 'total': 5}
    assert get_capacity(1, 0.5, 0.1, **grows_on) == 0.5
    assert get_capacity(2, 0.5, 0.1, **grows_on) == pytest.approx(0.625)
    assert get_capacity(5, 0.5, 0.1, **grows_on) == get_capacity(6, 0.5, 0.1, **grows_on) == 1.0


@pytest.mark.parametrize('shape', ['linear', 'cosine'])
@pytest.mark.parametrize('final', [None, 0.9])
def test_get_capacity_never_falls_or_leaves_its_range(shape, final):
    values = [get_capacity(e, 0.7, 0.2, shape=shape, final=final, total=4) for e in np.linspace(0, 4, 401)]
    assert values[0] == 0.2 and values[-1] == (final or 0.7)
    assert all(a <= b for a, b in itertools.pairwise(values))


def test_apply_capacity_sets_every_layer():
    model = tiny_model()
    apply_capacity(model, [0.3, 0.2], temperature=1.5)
    assert [(layer.capacity_T, layer.temperature) for layer in thinking_layers(model).values()] == [
        ([0.3, 0.2], 1.5)
    ] * 2
    apply_capacity(model, [0.4, 0.4])
    assert thinking_layers(model)[2].temperature == 1.5


class CapacityAtForward(Callback):
    """Capacity of step 1 that each forward pass runs with, by what it is for and the batch count."""

    def __init__(self):
        self.seen = []

    def before_forward(self, state, logger):
        self.seen.append(('train', state.timestamp.batch.value, *self.now(state)))

    def eval_before_forward(self, state, logger):
        self.seen.append(('eval', state.timestamp.batch.value, *self.now(state)))

    def now(self, state):
        layer = thinking_layers(state.model)[0]
        return layer.capacity_T[0], layer.temperature


@pytest.mark.parametrize('max_duration', ['8ba', '1ep'])
def test_capacity_in_training_and_evaluation_follows_the_timestamp(max_duration):
    seen = CapacityAtForward()
    warmup = CapacityWarmup('0.5dur', initial=0.1, initial_temperature=3.0)
    run = trainer(
        tiny_model(), [warmup, seen], max_duration=max_duration, microbatch=BATCH,
        eval_dataloader=Evaluator(
            label='eval', dataloader=DataLoader(batches(1), batch_size=2), metric_names=['LanguagePerplexity']
        ),
        eval_interval='3ba',
    )  # fmt: skip
    run.eval()  # before any training: the capacity of its first batch
    run.fit()
    run.close()
    for _, batch, capacity, temperature in seen.seen:
        assert capacity == pytest.approx(min(0.1 + 0.4 * batch / 4, 0.5))
        assert temperature == pytest.approx(max(3 - 2 * batch / 4, 1))
    assert [batch for what, batch, *_ in seen.seen if what == 'eval'] == [0, 0, 3, 3, 6, 6, 8, 8]


def test_capacity_warmup_that_resumes_with_other_settings_says_so(caplog):
    changed = CapacityWarmup('4ba', initial=0.2)
    changed.load_state_dict(CapacityWarmup('4ba', initial=0.1).state_dict())
    assert 'capacity_warmup.initial: the checkpoint was trained with 0.1; from here on it is 0.2' in caplog.text


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'initial': 0.0}, r'initial: 0.0 is not a share'),
        ({'initial': [0.1, 1.2]}, r'initial: 1.2 is not a share'),
        ({'final': 1.5}, r'final: 1.5 is not a share'),
        ({'shape': 'cosin'}, r"shape: 'cosin' .*did you mean 'cosine'"),
        ({'initial': None}, r'initial: None is not a share'),
        ({'initial': 'half'}, r"initial: 'half' is not a share"),
        ({'initial_temperature': 0}, r'initial_temperature: 0 is not a positive number'),
        ({'initial_temperature': 'hot'}, r"initial_temperature: 'hot' is not a positive number"),
        ({'initial': [0.1]}, r'initial: 1 values for 2 extra steps'),
        ({'final': 0.4}, r'final: 0.4 is below the ratio 0.5 of step 1'),
        ({'duration': '64tok', 'final': 1.0}, r'duration: with final it must be in the unit of max_duration \(8ba\)'),
        ({'duration': '8ba', 'final': 1.0}, r'duration: 8ba leaves no training after it'),
    ],
)
def test_capacity_warmup_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        fit(tiny_model(), [CapacityWarmup(**settings)])


@pytest.mark.parametrize(
    ('part', 'keys', 'message'),
    [
        (CapacityWarmup, {'thinking': 'none', 'token_ratios': None}, 'capacity_warmup: a model with thinking: none'),
        (CapacityWarmup, {'thinking': 'loop', 'token_ratios': None}, 'capacity_warmup: a model with thinking: loop'),
        (CapacityWarmup, {'token_routing': False}, 'capacity_warmup: with token_routing: false'),
        (RouterWeights, {'thinking': 'none', 'token_ratios': None}, 'router_weights: the model has no routers'),
        (RouterWeights, {'token_routing': False}, 'router_weights: the model has no routers'),
        (StepEncodings, {'step_encoding': False}, 'step_encodings: the model has no step encodings'),
    ],
)
def test_a_model_without_what_is_needed_is_refused_at_once(part, keys, message):
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(**keys), [part()])


# router_weights


def test_summary_against_numpy():
    weight_N = np.random.default_rng(0).random(101, dtype=np.float32)
    summary = summarise(RoutedTokens(weight_N, weight_N > 0.7, threshold=0.25))
    ranked = np.sort(weight_N)
    assert summary == pytest.approx(
        {
            'weight_mean': weight_N.sum() / 101,
            'weight_q05': ranked[5],
            'weight_q25': ranked[25],
            'weight_q50': ranked[50],
            'weight_q75': ranked[75],
            'weight_q95': ranked[95],
            'share_chosen': (weight_N > 0.7).sum() / 101,
            'threshold': 0.25,
        }
    )


def test_router_weights_are_those_of_the_whole_batch():
    logged = fit(tiny_model(), [RouterWeights('100ba')], max_duration='1ba')

    model, rows = tiny_model(), batches()[:BATCH]
    layers = thinking_layers(model)
    for layer in layers.values():
        layer.records = []
    model.model(input_ids=torch.stack([row['input_ids'] for row in rows]))
    for index, layer in layers.items():
        assert [record.step for record in layer.records] == [1, 2]
        for record in layer.records:
            name = f'router/{index + 1}-{record.step}'
            assert logged[f'{name}/weight_mean'] == [(0, pytest.approx(record.weight_BS.mean().item()))]
            assert logged[f'{name}/weight_q95'] == [
                (0, pytest.approx(np.quantile(record.weight_BS.numpy(), 0.95), rel=1e-5))
            ]
            assert logged[f'{name}/share_chosen'] == [(0, layer.capacity_T[record.step - 1])]


def test_router_weights_at_the_interval_and_at_the_end_and_nowhere_else():
    model, records = tiny_model(), []

    class Watch(Callback):
        def after_forward(self, state, logger):
            records.append(thinking_layers(state.model)[0].records)

    images = Images()
    logged = fit(model, [RouterWeights('3ba'), Watch()], loggers=[images])
    assert [batch for batch, _ in logged['router/1-1/weight_mean']] == [0, 3, 6, 7]
    assert set(map(str, records)) == {'None'}
    assert [step for step, _ in images.images['router/weights']] == [0, 3, 6, 7]


class StopError(Exception):
    pass


def test_recording_is_off_after_a_training_that_breaks_in_the_forward_pass():
    model = tiny_model()

    def stop(*_):
        assert thinking_layers(model)[0].records is not None
        raise StopError

    model.model.model.norm.register_forward_hook(stop)
    run = trainer(model, [RouterWeights()])
    with pytest.raises(StopError):
        run.fit()
    run.close()
    assert thinking_layers(model)[0].records is None


def test_a_recomputed_forward_pass_is_not_recorded_twice(monkeypatch):
    module = importlib.import_module('itt_composer.callbacks.router_weights.router_weights')
    sizes = []
    monkeypatch.setattr(
        module, 'plot_router_weights', lambda tokens: sizes.extend(t.weight_N.size for t in tokens.values())
    )
    model = tiny_model()
    layers = list(thinking_layers(model).values())
    apply_activation_checkpointing(model.model, check_fn=lambda m: m in layers)
    fit(model, [RouterWeights()], max_duration='1ba', loggers=[Images()])
    assert sizes == [BATCH * S] * 4


def test_histograms_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tiny_model(), [RouterWeights('4ba')], loggers=[TensorboardLogger(log_dir=str(tmp_path))], run_name='r')
    events = EventAccumulator(str(tmp_path / 'r'), size_guidance={'histograms': 0, 'images': 0})
    events.Reload()
    histogram = events.Histograms('router/3-2/weight')
    assert [event.step for event in histogram] == [0, 4, 7]
    assert histogram[0].histogram_value.num == BATCH * S
    assert [event.step for event in events.Images('router/weights')] == [0, 4, 7]


# step_encodings


def test_step_encodings_are_the_models(tmp_path):
    model = tiny_model()
    images = Images()
    logged = fit(model, [StepEncodings('5ba')], loggers=[images])
    for index, layer in thinking_layers(model).items():
        phi_TD = layer.phi_TD.detach().numpy()
        assert not np.allclose(phi_TD, 1)
        for t in range(3):
            series = logged[f'step_encoding/{index + 1}-{t}/mean']
            assert [batch for batch, _ in series] == [1, 5, 8]
            assert series[-1][1] == pytest.approx(phi_TD[t].mean(), rel=1e-5)
            norm = logged[f'step_encoding/{index + 1}-{t}/norm'][-1][1]
            assert norm == pytest.approx(np.sqrt((phi_TD[t] ** 2).sum()), rel=1e-5)
    assert [step for step, _ in images.images['step_encoding/means']] == [1, 5, 8]
    assert {number: phi.shape for number, phi in step_encodings(model).items()} == {1: (3, 16), 3: (3, 16)}


# gradient_nuclear_norm


@pytest.mark.parametrize('thinking', ['none', 'loop', 'itt'])
def test_gradient_norm_is_the_whole_batchs_before_clipping(thinking):
    keys = {'thinking': thinking} | ({} if thinking == 'itt' else {'token_ratios': None})
    parts = [GradientNuclearNorm(), GradientClipping(clipping_type='norm', clipping_threshold=1e-4)]
    logged = fit(tiny_model(**keys), parts, max_duration='1ba', microbatch=1)

    model = tiny_model(**keys)
    tokens = torch.stack([row['input_ids'] for row in batches()[:BATCH]])
    model.model(input_ids=tokens, labels=tokens).loss.backward()
    for i, layer in enumerate(model.model.model.layers):
        attention = (layer.f if hasattr(layer, 'f') else layer).self_attn
        for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
            gradient = getattr(attention, name).weight.grad.double().numpy()
            expected = np.linalg.norm(gradient, 'nuc')
            assert expected > 0
            assert logged[f'gradient_nuclear_norm/layer{i + 1}/{name}'] == [(0, pytest.approx(expected, rel=1e-3))]


def test_gpt2_projections_and_norms():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    tokens = torch.randint(32, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    norms = gradient_nuclear_norms(torch.nn.Sequential(model))  # inside a wrapper
    assert set(norms) == {(layer, f'{part}_proj') for layer in (1, 2) for part in 'qkvo'}
    for i, block in enumerate(model.transformer.h, start=1):
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
        '_orig_mod.model.layers.1._fsdp_wrapped_module.f._checkpoint_wrapped_module.self_attn.o_proj',
        'model.layers.1.mlp.gate_proj',
        'decoder.layers.0.encoder_attn.q_proj',
        'h.0.mlp.c_proj',
    ):
        parent = model
        for child in name.split('.'):
            if not hasattr(parent, child):
                parent.add_module(child, torch.nn.Module())
            parent = getattr(parent, child)
    assert set(attention_projections(model)) == {(1, 'q_proj'), (2, 'o_proj')}


def test_a_model_without_known_attention_is_refused():
    state = SimpleNamespace(model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match='gradient_nuclear_norm: no attention projections found'):
        GradientNuclearNorm().init(state, None)


def test_a_gradient_that_is_not_finite_is_nan_not_an_error():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    assert all(math.isnan(norm) for norm in gradient_nuclear_norms(model).values())


# Pictures


@pytest.mark.parametrize(
    'draw',
    [
        lambda: plot_router_weights(
            {(1, 1): RoutedTokens(np.array([-0.5, 0.5]), np.array([False, True]), 0.0)}  # tanh, one panel
        ),
        lambda: plot_router_weights(
            {(i, t): RoutedTokens(np.ones(4), np.full(4, i == 1), 0.0) for i in (1, 3) for t in (1, 2)}  # all, none
        ),
        lambda: plot_step_encodings({i: [1.0, 0.9, 1.1] for i in range(1, 33)}),
        lambda: plot_gradient_nuclear_norms({(1, 'q_proj'): 0.0, (2, 'q_proj'): 1.0}),
    ],
)
def test_pictures_are_arrays_with_something_on_them(draw):
    image_HWC = draw()
    assert image_HWC.dtype == np.uint8 and image_HWC.ndim == 3 and image_HWC.shape[2] == 3
    assert len(np.unique(image_HWC.reshape(-1, 3), axis=0)) > 10
