"""What transformers asks of any model: hidden states, attentions, embeddings in place of ids, a base model."""

import itertools

import pytest
import torch
from common.small_models import SHAPE, build
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from itt_composer.model import ITTConfig, ITTForCausalLM, ITTModel
from itt_composer.model.selection import Selection

THINKING = {
    'dense': {},
    'loop': dict(thinking='loop', thinking_steps=2),
    'residual_scale': dict(thinking='residual_scale'),
    'itt': dict(thinking='itt', evaluation_selection='threshold'),
}


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def test_states_and_attentions_of_the_dense_model_are_llamas(ids):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation='eager'))
    ours = ITTForCausalLM.from_pretrained_dense(theirs)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    options = dict(attention_mask=mask, output_hidden_states=True, output_attentions=True)
    expected, got = theirs(ids, **options), ours(ids, **options)
    assert len(got.hidden_states) == len(expected.hidden_states) == 5
    assert len(got.attentions) == len(expected.attentions) == 4
    real = mask.bool()
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_close(a[real], b[real], rtol=1e-5, atol=1e-5)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)
    with_cache = ours.eval()(ids[:, :7], use_cache=True).past_key_values
    later = ours(ids[:, 7:], past_key_values=with_cache, output_attentions=True)
    assert_close(later.attentions[1], ours(ids, output_attentions=True).attentions[1][:, :, 7:])


@pytest.mark.parametrize('family', THINKING)
def test_states_are_one_per_layer_after_its_last_step(family, ids):
    model = build(**THINKING[family])
    after = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: after.append(output[0]))
    # Attentions go another way through the base pass, to the same result.
    both = model(ids, output_hidden_states=True, output_attentions=True)
    states = model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states
    assert_close(both.hidden_states, states)
    assert torch.equal(states[0], model.model.embed_tokens(ids))
    assert_close(list(states[1:-1]), after[4:7])
    assert_close(states[-1], model.model.norm(after[7]))
    assert_close(both.logits, model.lm_head(states[-1]))
    assert [weights.shape for weights in both.attentions] == [(2, 4, 11, 11)] * 4
    assert_close(torch.stack(both.attentions).sum(-1), torch.ones(4, 2, 4, 11))
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 5
    loss, _, states = model(ids, labels=ids, return_dict=False)
    assert loss.dim() == 0 and len(states) == 5


@pytest.mark.parametrize('family', THINKING)
def test_embeddings_in_place_of_ids(family, ids):
    model = build(**THINKING[family])
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), expected[:, 11:])
    assert torch.equal(model.generate(inputs_embeds=embedded, use_cache=False, **options), expected[:, 11:])
    assert torch.equal(model.generate(ids, inputs_embeds=embedded, **options), expected)
    with pytest.raises(ValueError, match='pass input_ids or inputs_embeds, one of them'):
        model(ids, inputs_embeds=embedded)
    with pytest.raises(ValueError, match='pass input_ids or inputs_embeds, one of them'):
        model()


def test_arguments_that_the_model_has_no_use_for_are_named(ids):
    model = build()
    with pytest.warns(UserWarning, match='no use of token_type_ids'):
        model(ids, token_type_ids=torch.zeros_like(ids), another=None)


@pytest.mark.parametrize('family', ['dense', 'itt'])
def test_the_base_model_is_a_model_of_its_own(family, ids, tmp_path):
    model = build(**THINKING[family])
    expected = model.model(ids)
    assert model.base_model is model.model is model.get_decoder()
    model.save_pretrained(tmp_path / 'lm')
    base = AutoModel.from_pretrained(tmp_path / 'lm')
    assert type(base) is ITTModel
    assert_close(base(ids).last_hidden_state, expected.last_hidden_state)
    base.save_pretrained(tmp_path / 'base')
    remote = AutoModel.from_pretrained(tmp_path / 'base', trust_remote_code=True)
    assert type(remote).__module__.endswith('modeling_itt')
    assert_close(remote(ids).last_hidden_state, expected.last_hidden_state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    assert_close(again.model(ids).last_hidden_state, expected.last_hidden_state)
    assert type(AutoModel.from_config(ITTConfig(**SHAPE))) is ITTModel


def test_export_of_a_graph(ids):
    for kv in ('refresh', 'routed_only'):
        options = dict(thinking='itt', thinking_steps=2, evaluation_selection='threshold', thinking_kv=kv)
        model = build(**options, num_hidden_layers=1)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        graph = torch.export.export(model, (ids, mask), strict=False).module()
        # The tokens decide which ones are routed, in the graph too.
        assert_close(graph(ids.flip(1), mask).logits, model(ids.flip(1), mask).logits)
    model = build(thinking='itt', evaluation_selection='top_k')
    with pytest.raises(ValueError, match=r'torch.export: top_k routing has shapes that depend on values'):
        torch.export.export(model, (ids, mask), strict=False)


def test_one_new_token_of_each_sequence():
    """What decoding selects: the tokens where the mask is True, of sequences that have one."""
    for mask in itertools.product([True, False], repeat=3):
        routed_B1 = torch.tensor(mask)[:, None]
        routed = Selection.from_mask(routed_B1)
        assert torch.equal(routed.mask(), routed_B1)
        assert routed.is_empty == (not any(mask)) and routed.is_all == all(mask)
        assert len(routed.gather(torch.randn(3, 1, 5)).flatten(0, 1)) == sum(mask)
