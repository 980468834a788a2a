"""Fact 1: the plain model is Hugging Face's LLaMA, logits and gradients, for the head layouts of Table 5."""

import pytest
import torch
from common.gradients import assert_same_logits_and_loss
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from itt_composer.model import ITTConfig, ITTForCausalLM

# Head counts of Table 5 with narrower heads; 230m has two query heads to a key-value head, the others one.
SHAPES = {
    '162m': dict(hidden_size=128, intermediate_size=320, num_attention_heads=32, num_key_value_heads=32),
    '230m': dict(hidden_size=192, intermediate_size=320, num_attention_heads=32, num_key_value_heads=16),
}


def llama(shape: str, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=211, num_hidden_layers=8, rms_norm_eps=1e-5, **SHAPES[shape])
    return LlamaForCausalLM(config)


@pytest.mark.parametrize('shape', SHAPES)
def test_plain_model_equals_llama(shape):
    theirs = llama(shape)
    ours = ITTForCausalLM.from_pretrained_dense(theirs)
    ids = torch.randint(211, (3, 37), generator=torch.Generator().manual_seed(1))
    assert_same_logits_and_loss(ours, theirs, ids, labelled=20)
    expected_grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert expected_grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected_grads[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f'{n}: {m}')


def test_left_padding_and_bfloat16():
    theirs = llama('230m').to(torch.bfloat16).eval()
    ours = ITTForCausalLM.from_pretrained_dense(theirs)
    assert ours.dtype is torch.bfloat16
    ids = torch.randint(211, (2, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = ours(ids, mask, positions).logits[mask.bool()]
    assert_close(got, theirs(ids, mask, positions).logits[mask.bool()], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('thinking', ['itt', 'loop', 'residual_scale'])
def test_weights_with_the_old_name_of_the_block_are_read(tmp_path, thinking):
    model = ITTForCausalLM(ITTConfig(vocab_size=50, num_hidden_layers=2, thinking=thinking, **SHAPES['162m'])).eval()
    old = {name.replace('.block.', '.f.'): weight for name, weight in model.state_dict().items()}
    assert any('.f.' in name for name in old)
    ids, again = torch.arange(12)[None], ITTForCausalLM(model.config).eval()
    with pytest.warns(FutureWarning, match='old name `f`'):
        again.load_state_dict(old)
    model.save_pretrained(tmp_path)
    save_file(old, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.warns(FutureWarning, match='old name `f`'):
        loaded, report = ITTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report['missing_keys'] and not report['unexpected_keys']
    for other in (again, loaded):
        assert_close(other(ids).logits, model(ids).logits)
