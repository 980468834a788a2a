"""The thinking layers against the written-out float64 recurrence, for every option (SPEC sections 3 and 8)."""

import itertools

import pytest
import torch
from common import reference
from common.operations import Operations
from common.thinking_cases import CHOICES, B, D, S, compare_with_reference, rotation, small_config, small_layer, states
from torch.testing import assert_close

from itt_composer.model import ITTForCausalLM, LoopLayer, ResidualScaleLayer

# Every seventh combination: seven divides no number of values, and any three options meet in all their combinations.
COMBINATIONS = [dict(zip(CHOICES, values, strict=True)) for values in list(itertools.product(*CHOICES.values()))[::7]]


def test_any_three_options_meet_in_all_their_combinations():
    for keys in itertools.combinations(CHOICES, 3):
        met = {tuple(options[key] for key in keys) for options in COMBINATIONS}
        assert met == set(itertools.product(*(CHOICES[key] for key in keys)))


@pytest.mark.parametrize('kv', CHOICES['thinking_kv'])
@pytest.mark.parametrize('combine', CHOICES['combine'])
def test_every_option_matches_the_recurrence(combine, kv):
    for options in COMBINATIONS:
        if options['combine'] == combine and options['thinking_kv'] == kv:
            compare_with_reference(options)


@pytest.mark.parametrize(
    ('kv', 'residual'), [('refresh', True), ('refresh', False), ('shared', True), ('routed_only', False)]
)
@pytest.mark.parametrize('combine', CHOICES['combine'])
def test_without_token_routing(combine, kv, residual):
    """Fact 3, and its kin: every token takes every step, with weight one."""
    compare_with_reference(
        dict(combine=combine, thinking_kv=kv, residual_thinking=residual, token_routing=False, token_ratios=[1, 1])
    )


def test_alpha_per_step():
    compare_with_reference(dict(alpha=[0.3, 1.7]))


@pytest.mark.parametrize('selection', CHOICES['selection'])
def test_router_temperature(selection):
    """It divides what makes the weights, and top-p's softmax; a threshold is of the score itself."""
    compare_with_reference(dict(router_temperature=0.4, selection=selection))


@pytest.mark.parametrize('combine', CHOICES['combine'])
@pytest.mark.parametrize('kv', CHOICES['thinking_kv'])
def test_zero_step_encodings_give_the_plain_model_exactly(combine, kv):
    """Fact 2."""
    torch.manual_seed(3)
    plain = ITTForCausalLM(small_config(thinking='none', token_ratios=None))
    itt = ITTForCausalLM(small_config(combine=combine, thinking_kv=kv))
    weights = itt.state_dict()
    for name, value in plain.state_dict().items():
        weights[name.replace('layers.0.', 'layers.0.block.')].copy_(value)
    weights['model.layers.0.phi_TD'][1:] = 0
    ids = torch.randint(31, (B, S))
    assert torch.equal(itt(ids).logits, plain(ids).logits)


@pytest.mark.parametrize('thinking_layers', [[0], [[0, 1]]], ids=['layer', 'block'])
@pytest.mark.parametrize('selection', CHOICES['selection'])
@pytest.mark.parametrize('combine', ['weighted', 'algorithm1', 'delta'])
def test_tokens_that_are_not_routed_keep_their_bits(combine, selection, thinking_layers):
    """Fact 4 (``equation7`` changes them by definition)."""
    config = small_config(combine=combine, selection=selection, thinking_layers=thinking_layers, token_ratios=[0.5])
    layer, x_BSD = small_layer(config), states()
    with layer.routing.recording() as records:
        y_BSD, _ = layer(x_BSD, rotation(config))
    y0_BSD = layer.block(x_BSD, rotation(config))[0] * layer.phi_TD[0]
    routed_BS = records[0].routed_BS
    assert len(records) == 1 and 0 < routed_BS.sum() < B * S
    assert torch.equal(y_BSD[~routed_BS], y0_BSD[~routed_BS])
    assert (y_BSD[routed_BS] != y0_BSD[routed_BS]).any(-1).all()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'options', [{}, {'thinking_kv': 'shared'}, {'thinking_kv': 'routed_only'}, {'selection': 'top_p'}]
)
def test_padding_changes_nothing(options, training):
    """A batch of sequences of different lengths, padded on either side, gives each what it gives alone."""
    config = small_config(token_ratios=[0.6, 0.5], **options)
    torch.manual_seed(0)
    model = ITTForCausalLM(config).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    # No token twice: two equal ones at the start have one state, and rounding alone orders their scores.
    ids = torch.randperm(31)[:18].view(2, 9)
    left, right = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    left[0, :4], right[0, 5:] = 0, 0
    position_ids = (left.cumsum(-1) - 1).clamp(min=0)
    alone = model(ids[:1, 4:]).logits[0]
    assert_close(model(ids, left, position_ids).logits[0, 4:], alone, rtol=1e-4, atol=1e-4)
    assert_close(model(ids.roll(5, 1), right).logits[0, :5], alone, rtol=1e-4, atol=1e-4)


def test_loop_runs_f_n_times():
    """A Loop x3 layer is f(f(f(x))), nothing added."""
    config = small_config(thinking='loop', token_ratios=None, thinking_steps=2)
    torch.manual_seed(0)
    layer, x_BSD = LoopLayer(config, 0), states()
    expected = []
    for x_SD in x_BSD:
        y = dict(enumerate(x_SD.double()))
        for _ in range(3):
            y = reference.f(layer.block, config, y, {}, own_keys=True)
        expected.append(torch.stack([y[p] for p in range(S)]))
    assert_close(layer(x_BSD, rotation(config))[0].double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_bfloat16_follows_float32(dtype):
    config = small_config(combine='weighted')
    layer, x_BSD = small_layer(config), states()
    y_BSD, _ = layer(x_BSD, rotation(config))
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype is torch.bfloat16):
        amp_BSD, _ = layer(x_BSD, rotation(config))
    cast_BSD, _ = layer.to(dtype)(x_BSD.to(dtype), rotation(config))
    assert cast_BSD.dtype is dtype
    for other in (amp_BSD, cast_BSD):
        # A token whose score is near the k-th may be chosen in one and not in the other; the typical token agrees.
        error = (other.float() - y_BSD).norm(dim=-1) / y_BSD.norm(dim=-1)
        assert error.median() < (1e-6 if dtype is torch.float32 else 0.05)


def test_scores_are_float32_under_autocast_and_compilation():
    layer, y_BSD = small_layer(small_config()), states()
    expected_BS = layer.score(y_BSD, 1)
    score = torch.compile(layer.score, backend='eager', fullgraph=True)
    with torch.autocast('cpu', torch.bfloat16):
        for score_BS in (layer.score(y_BSD, 1), score(y_BSD, 1)):
            assert_close(score_BS, expected_BS, rtol=1e-6, atol=1e-6)


def test_autocast_casts_what_several_projections_read_once():
    block, x_BSD, tables = small_layer(small_config()).block, states(), rotation(small_config()).to(torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16), Operations() as seen:
        block(x_BSD, tables)
    assert seen.counts['aten::_to_copy'] <= 7 + 2, 'seven weights and the results of two norms'


def test_residual_scale_multiplies_the_stream_after_one_pass():
    """The control's logits are those of a plain model whose layer 0 is followed by a factor; at one it is the plain."""
    config = small_config(thinking='residual_scale', token_ratios=None)
    torch.manual_seed(0)
    layer, x_BSD = ResidualScaleLayer(config, 0), states()
    layer.phi_D.data.copy_(torch.linspace(-1, 2, D))
    expected = layer.block(x_BSD, rotation(config))[0] * torch.linspace(-1, 2, D)
    assert torch.equal(layer(x_BSD, rotation(config))[0], expected)
    models = {}
    for thinking, init in (('none', None), ('residual_scale', 1.0), ('residual_scale', None)):
        torch.manual_seed(0)
        models[thinking, init] = ITTForCausalLM(
            small_config(thinking=thinking, token_ratios=None, residual_scale_init=init)
        )
    ids = torch.arange(12)[None]
    logits = {key: model(ids).logits for key, model in models.items()}
    assert torch.equal(logits['residual_scale', 1.0], logits['none', None])
    assert not torch.allclose(logits['residual_scale', None], logits['none', None])
    assert (models['residual_scale', None].model.layers[0].phi_D == 2).all()
    with pytest.raises(ValueError, match='residual_scale has no steps'):
        small_config(thinking='residual_scale', token_ratios=[0.5])


def test_initial_step_encodings():
    """phi[0] starts at one, the steps' own at ``step_encoding_init``; at zero the model is the plain one, or, with
    ``residual_scale_init``, the control that grows."""
    no_steps = {'thinking': 'itt', 'token_ratios': [0.5, 0.25], 'step_encoding_init': 0.0}
    ids, logits = torch.arange(12)[None], []
    for options in (
        no_steps,
        {'thinking': 'none'},
        {**no_steps, 'residual_scale_init': 2.0},
        {'thinking': 'residual_scale'},
    ):
        torch.manual_seed(0)
        model = ITTForCausalLM(small_config(**{'token_ratios': None, **options}))
        logits.append(model(ids).logits)
        if options['thinking'] == 'itt':
            phi_TD = model.model.layers[0].phi_TD
            assert (phi_TD[0] == options.get('residual_scale_init', 1)).all() and (phi_TD[1:] == 0).all()
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[2], logits[3])
    assert not torch.allclose(logits[0], logits[2])
