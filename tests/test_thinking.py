"""The thinking layers against the written-out float64 recurrence, for every option (SPEC sections 3 and 8)."""

import copy
import itertools

import pytest
import torch
from common import reference
from torch.testing import assert_close

from itt_composer.model import ITTConfig, ITTForCausalLM
from itt_composer.model.block import Rotation
from itt_composer.model.residual_scale import ResidualScaleLayer
from itt_composer.model.thinking import ITTLayer, LoopLayer

B, S, D = 2, 7, 12
CHOICES = {
    'combine': ['weighted', 'equation7', 'algorithm1', 'delta'],
    'thinking_kv': ['refresh', 'shared', 'routed_only'],
    'residual_thinking': [True, False],
    'step_encoding': [True, False],
    'selection': ['top_k', 'top_p', 'threshold'],
    'weight_norm': ['sigmoid', 'tanh'],
    'reweighting': ['routed_only', 'symmetric'],
}
EVERY_OPTION = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]


def small_config(**options) -> ITTConfig:
    shape = dict(vocab_size=31, hidden_size=D, intermediate_size=10, num_hidden_layers=2, num_attention_heads=3)
    options = {'thinking': 'itt', 'token_ratios': [0.75, 0.45], **options}
    # In evaluation mode too the training rules are what is compared.
    options.setdefault('evaluation_selection', options.get('selection', 'top_k'))
    return ITTConfig(**shape, num_key_value_heads=1, **options)


def small_layer(config: ITTConfig, seed: int = 0) -> ITTLayer:
    """A layer with every parameter far from its initial value, so that none of them is neutral."""
    generator = torch.Generator().manual_seed(seed)
    layer = ITTLayer(config, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * (12 / D) ** 0.5 * torch.randn(parameter.shape, generator=generator))
        if layer.phi_TD is not None:
            layer.phi_TD += 1
        layer.threshold_T.copy_(torch.tensor([-0.2, 0.1])[: config.thinking_steps])
    return layer.eval()


def states(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed))


def rotation(config: ITTConfig, device: str = 'cpu') -> Rotation:
    return Rotation.at(torch.arange(S, device=device)[None], config)


def compare_with_reference(options: dict, device: str = 'cpu') -> None:
    """The layer on ``device``, in training and in evaluation, against the recurrence, which is worked out on the CPU.

    The two modes hold the chosen tokens in different ways (``Selection``, ``PackedSelection``).
    """
    config = small_config(**options)
    layer, x_BSD = small_layer(config), states().requires_grad_()
    probe = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2))
    expected = torch.stack([reference.itt_layer(layer, config, x_SD) for x_SD in x_BSD])
    expected_grads = torch.autograd.grad((expected * probe).sum(), [x_BSD, *layer.parameters()])
    names = ['x', *(name for name, _ in layer.named_parameters())]
    for training in (True, False):
        case = f'{options}, {"training" if training else "evaluation"}'
        there = copy.deepcopy(layer).to(device).train(training)
        y_BSD = there(x_BSD.to(device), rotation(config, device))[0].cpu()
        grads = torch.autograd.grad((y_BSD * probe).sum(), [x_BSD, *there.parameters()])
        assert_close(y_BSD.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda m, case=case: f'{case}: {m}')
        for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
            assert expected_grad.abs().max() > 0, f'{case}: no gradient reaches {name}'
            error = (grad.cpu() - expected_grad).abs().max() / expected_grad.abs().max()
            assert error < 1e-3, f'{case}: gradient of {name} is off by {error:.1e}'


@pytest.mark.parametrize('kv', CHOICES['thinking_kv'])
@pytest.mark.parametrize('combine', CHOICES['combine'])
def test_every_option_matches_the_recurrence(combine, kv):
    for options in EVERY_OPTION:
        if options['combine'] == combine and options['thinking_kv'] == kv:
            compare_with_reference(options)


@pytest.mark.parametrize('kv', CHOICES['thinking_kv'])
@pytest.mark.parametrize('combine', CHOICES['combine'])
@pytest.mark.parametrize('residual', [True, False])
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


@pytest.mark.parametrize('key', CHOICES)
def test_each_option_changes_the_output(key):
    """No option is ignored: from the defaults, each value gives another output."""
    outputs = []
    for value in CHOICES[key]:
        config = small_config(**{key: value})
        outputs.append(small_layer(config)(states(), rotation(config))[0])
    for one, other in itertools.combinations(outputs, 2):
        assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize('combine', CHOICES['combine'])
@pytest.mark.parametrize('kv', CHOICES['thinking_kv'])
def test_zero_step_encodings_give_the_plain_model_exactly(combine, kv):
    """Fact 2."""
    torch.manual_seed(3)
    plain = ITTForCausalLM(small_config(thinking='none', token_ratios=None))
    itt = ITTForCausalLM(small_config(combine=combine, thinking_kv=kv))
    weights = itt.state_dict()
    for name, value in plain.state_dict().items():
        weights[name.replace('layers.0.', 'layers.0.f.')].copy_(value)
    weights['model.layers.0.phi_TD'][1:] = 0
    ids = torch.randint(31, (B, S))
    assert torch.equal(itt(ids).logits, plain(ids).logits)


@pytest.mark.parametrize('selection', CHOICES['selection'])
@pytest.mark.parametrize('combine', ['weighted', 'algorithm1', 'delta'])
def test_tokens_that_are_not_chosen_keep_their_bits(combine, selection):
    """Fact 4 (``equation7`` changes them by definition)."""
    config = small_config(combine=combine, selection=selection, token_ratios=[0.5])
    layer, x_BSD = small_layer(config), states()
    layer.records = []
    y_BSD, _ = layer(x_BSD, rotation(config))
    y0_BSD = layer.f(x_BSD, rotation(config))[0] * layer.phi_TD[0]
    chosen_BS = layer.records[0].chosen_BS
    assert 0 < chosen_BS.sum() < B * S
    assert torch.equal(y_BSD[~chosen_BS], y0_BSD[~chosen_BS])
    assert (y_BSD[chosen_BS] != y0_BSD[chosen_BS]).any(-1).all()


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
            y = reference.f(layer.f, config, y, {}, own_keys=True)
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


def test_families_start_from_the_same_weights():
    """Models of one seed are comparable: only routers, step encodings and the control's growth are added."""
    models = []
    for thinking in ('none', 'loop', 'itt', 'residual_scale'):
        torch.manual_seed(17)
        models.append(ITTForCausalLM(small_config(thinking=thinking, token_ratios=None)))
    plain = models[0].state_dict()
    for model in models[1:]:
        weights = model.state_dict()
        for name, value in plain.items():
            assert torch.equal(weights[name.replace('layers.0.', 'layers.0.f.')], value), name


def test_residual_scale_multiplies_the_stream_after_one_pass():
    """The control's logits are those of a plain model whose layer 0 is followed by a factor; at one it is the plain."""
    config = small_config(thinking='residual_scale', token_ratios=None)
    torch.manual_seed(0)
    layer, x_BSD = ResidualScaleLayer(config, 0), states()
    layer.phi_D.data.copy_(torch.linspace(-1, 2, D))
    expected = layer.f(x_BSD, rotation(config))[0] * torch.linspace(-1, 2, D)
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
