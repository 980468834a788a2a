"""Thinking in blocks of several layers (SPEC section 10): the recurrence, LLaMA's layers repeated by hand, folders."""

import importlib.util
import sys

import pytest
import torch
from common.small_models import KV, MODELS, SHAPE, build
from common.thinking_cases import compare_with_reference
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from itt_composer.evaluation.calibrate import calibrate, routed_fractions
from itt_composer.model import ITTConfig, ITTForCausalLM, layer_name

BLOCKS = {'thinking_layers': [[1, 2], 3]}


@pytest.fixture(scope='module')
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    'options',
    [
        {'thinking_kv': 'refresh', 'selection': 'threshold'},
        {'thinking_kv': 'shared'},
        {'thinking_kv': 'routed_only'},
        {'thinking_kv': 'refresh', 'combine': 'delta', 'token_routing': False, 'token_ratios': [1, 1]},
    ],
)
def test_a_block_matches_the_recurrence(options):
    """Outputs and every gradient; each layer of the block has its own keys and values."""
    compare_with_reference({**options, 'thinking_layers': [[0, 1]]})


@pytest.mark.parametrize('kv', KV)
def test_zero_step_encodings_give_the_dense_model_exactly(kv, llama, ids):
    """Fact 2, in training and evaluation, with the hidden states and attentions of every layer."""
    dense = ITTForCausalLM.from_pretrained_dense(llama)
    itt = ITTForCausalLM.from_pretrained_dense(llama, thinking='itt', thinking_kv=kv, **BLOCKS)
    for training in (True, False):
        expected, got = (
            model.train(training)(ids, output_hidden_states=True, output_attentions=True) for model in (dense, itt)
        )
        assert torch.equal(got.logits, expected.logits)
        for key in ('hidden_states', 'attentions'):
            assert len(got[key]) == len(expected[key])
            assert all(map(torch.equal, got[key], expected[key])), key


@pytest.mark.parametrize('thinking', ['loop', 'itt', 'residual_scale'])
def test_hidden_states_of_a_block(thinking, ids):
    """The base pass within it, the last step at its end."""
    model = build(thinking=thinking, **BLOCKS)
    base, after = [], []
    model.get_submodule(f'model.{layer_name(model.config, 1)}').register_forward_hook(
        lambda module, args, output: base.append(output[0])
    )
    for i in (0, 1, 3):
        model.model.layers[i].register_forward_hook(lambda module, args, output: after.append(output[0]))
    got = model(ids, output_hidden_states=True)
    expected = [model.model.embed_tokens(ids), after[0], base[0], after[1], model.model.norm(after[2])]
    assert len(got.hidden_states) == 5 and all(map(torch.equal, got.hidden_states, expected))


def test_a_loop_is_the_dense_layers_repeated_by_hand(llama, ids):
    """Logits and gradients of transformers' LLaMA whose list of layers names them again."""
    with pytest.warns(UserWarning, match='thinking: loop starts from other logits'):
        ours = ITTForCausalLM.from_pretrained_dense(llama, thinking='loop', thinking_steps=2, thinking_layers=[[1, 2]])
    theirs = LlamaForCausalLM(llama.config)
    theirs.load_state_dict(llama.state_dict())
    names = [name for name, _ in theirs.named_parameters()]
    parameters = list(theirs.parameters())
    theirs.model.layers = nn.ModuleList(theirs.model.layers[i] for i in (0, 1, 2, 1, 2, 1, 2, 3))
    theirs.model.config.num_hidden_layers = 8
    expected, got = (model(ids, labels=ids, use_cache=False) for model in (theirs, ours))
    theirs.model.config.num_hidden_layers = 4
    assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(expected.loss, parameters)
    got.loss.backward()
    for name, gradient in zip(names, gradients, strict=True):
        if name.startswith('model.layers.'):
            layer, _, rest = name.removeprefix('model.layers.').partition('.')
            name = f'model.{layer_name(ours.config, int(layer))}.{rest}'
        assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('layers', [{}, BLOCKS], ids=['layers', 'blocks'])
@pytest.mark.parametrize('thinking', ['loop', 'itt', 'residual_scale'])
def test_families_start_from_the_same_weights(thinking, layers):
    """Models of one seed are comparable: only routers, step encodings and the control's growth are added."""
    torch.manual_seed(17)
    dense = ITTForCausalLM(ITTConfig(**SHAPE))
    torch.manual_seed(17)
    model = ITTForCausalLM(ITTConfig(**SHAPE, thinking=thinking, **layers))
    same = {name: name for name in ('lm_head', 'model.embed_tokens', 'model.norm')}
    same |= {f'model.layers.{i}': f'model.{layer_name(model.config, i)}' for i in range(4)}
    for name, its_name in same.items():
        one, other = dense.get_submodule(name), model.get_submodule(its_name)
        assert_close(dict(other.named_parameters()), dict(one.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize('name', ['itt blocks shared', 'loop blocks'])
def test_a_folder_holds_the_blocks(name, ids, tmp_path, monkeypatch):
    """Through this package, and through the modelling file in the folder."""
    model = build(**MODELS[name])
    model.save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location('modeling_itt_of_blocks', tmp_path / 'modeling_itt.py')
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, alone)
    spec.loader.exec_module(alone)
    for code in (ITTForCausalLM, alone.ITTForCausalLM):
        again = code.from_pretrained(tmp_path)
        assert again.config.thinking_layers == MODELS[name]['thinking_layers']
        assert_close(again(ids).logits, model(ids).logits)


def test_blocks_are_calibrated_by_their_first_layer():
    model = build(**MODELS['itt blocks refresh'])
    rows = torch.randint(97, (8, 64), generator=torch.Generator().manual_seed(3))
    ratios = [0.3, 0.6, 0.2]
    assert len(calibrate(model, rows, ratios)) == 2
    model.set_thinking(ratios)
    fractions = routed_fractions(model, rows)
    assert list(fractions) == [(layer, step) for layer in (0, 3) for step in (1, 2, 3)]
    assert all(fraction == pytest.approx(ratios[step - 1], abs=0.01) for (_, step), fraction in fractions.items())
