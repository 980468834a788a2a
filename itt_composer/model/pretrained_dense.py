"""Pretrained decoders of other families as options and weights of the one block.

A family is supported where the block can compute exactly what transformers' model computes. Every key of its config is
therefore either read here, or known to change nothing, or at the value that transformers has by default; any other is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from itt_composer.model.blocks import layer_name
from itt_composer.model.config import ITTConfig
from itt_composer.options import ModelOptions

WHERE = 'from_pretrained_dense'

# Read under the same name, by all families but GPT-2.
SAME_NAME = (
    'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads', 'max_position_embeddings', 'rms_norm_eps', 'rope_theta', 'rope_scaling',
    'initializer_range', 'bos_token_id', 'eos_token_id', 'tie_word_embeddings',
)  # fmt: skip

# Keys that change no logit. Dropout is not in the function that a model computes; it is left out of training too.
NEUTRAL = {
    *PretrainedConfig._get_global_generation_defaults(),
    '_attn_implementation_autoset', '_name_or_path', 'architectures', 'attention_dropout', 'auto_map',
    'decoder_start_token_id', 'dtype', 'finetuning_task', 'id2label', 'is_llama_config', 'label2id', 'model_type',
    'name_or_path', 'output_attentions', 'output_hidden_states', 'pad_token_id', 'prefix', 'pretraining_tp',
    'problem_type', 'return_dict', 'sep_token_id', 'task_specific_params', 'tokenizer_class', 'torch_dtype',
    'torchscript', 'transformers.js_config', 'transformers_version', 'unsloth_fixed', 'use_cache',
}  # fmt: skip

# Values that mean the same as the default.
EQUIVALENT = {'hidden_act': ('swish',), 'partial_rotary_factor': (1.0,), 'activation_function': ('gelu_pytorch_tanh',)}


@dataclass(frozen=True)
class Family:
    """A family of pretrained decoders: its class, the config keys that are read, what they and the weights become."""

    causal_lm: str
    """Name of the class in transformers."""
    keys: tuple[str, ...]
    """Config keys that ``options`` reads, and those that are neutral in this family."""
    options: Callable[[PretrainedConfig], dict[str, Any]]
    weights: Callable[[Mapping[str, Tensor]], Iterator[tuple[str, Tensor]]]
    """Each weight, or gradient, under the name and in the layout of the dense baseline."""


def _llama_options(config: PretrainedConfig) -> dict[str, Any]:
    _check_window(config)
    # Classes whose config has no biases to choose have them in the code.
    qkv_bias, o_bias = (True, False) if config.model_type == 'qwen2' else [getattr(config, 'attention_bias', False)] * 2
    return {
        **{key: getattr(config, key) for key in SAME_NAME if hasattr(config, key)},
        'head_dim': getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads,
        'qkv_bias': qkv_bias,
        'o_bias': o_bias,
        'qk_norm': config.model_type == 'qwen3',
    }


def _check_window(config: PretrainedConfig) -> None:
    """Refuse a sliding window that some token of the longest context would look beyond."""
    window = getattr(config, 'sliding_window', None)
    used = getattr(config, 'use_sliding_window', config.model_type == 'mistral')
    if used and window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f'{WHERE}: sliding_window: {window}, which is less than max_position_embeddings '
            f'({config.max_position_embeddings}), and this decoder attends to all earlier tokens; load the model with '
            f'max_position_embeddings={window}, and pass it here'
        )


def _gpt2_options(config: PretrainedConfig) -> dict[str, Any]:
    same = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'max_position_embeddings')
    special = ('initializer_range', 'bos_token_id', 'eos_token_id', 'tie_word_embeddings')
    return {
        **{key: getattr(config, key) for key in (*same, *special)},
        'intermediate_size': config.n_inner or 4 * config.n_embd,
        'rms_norm_eps': config.layer_norm_epsilon,
        'norm': 'layernorm',
        'mlp': 'gelu',
        'qkv_bias': True,
        'o_bias': True,
        'position': 'learned',
    }


GPT2_NAMES = {
    'transformer.wte.': 'model.embed_tokens.',
    'transformer.wpe.': 'model.embed_positions.',
    'transformer.ln_f.': 'model.norm.',
    'transformer.h.': 'model.layers.',
    '.ln_1.': '.input_layernorm.',
    '.ln_2.': '.post_attention_layernorm.',
    '.attn.c_attn.': '.self_attn.{}_proj.',
    '.attn.c_proj.': '.self_attn.o_proj.',
    '.mlp.c_fc.': '.mlp.up_proj.',
    '.mlp.c_proj.': '.mlp.down_proj.',
}


def _gpt2_weights(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """GPT-2 stores its matrices transposed, and those of queries, keys and values as one."""
    for name, weight in weights.items():
        if '.c_' in name and weight.dim() == 2:
            weight = weight.T
        for theirs, ours in GPT2_NAMES.items():
            name = name.replace(theirs, ours)
        if '{}' not in name:
            yield name, weight
            continue
        for part, rows in zip('qkv', weight.chunk(3), strict=True):
            yield name.format(part), rows


def _llama_weights(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from weights.items()


LLAMA_KEYS = (*SAME_NAME, 'head_dim')
WINDOW_KEYS = ('use_sliding_window', 'sliding_window', 'max_window_layers')
FAMILIES = {
    'llama': Family('LlamaForCausalLM', (*LLAMA_KEYS, 'attention_bias'), _llama_options, _llama_weights),
    'mistral': Family('MistralForCausalLM', (*LLAMA_KEYS, 'sliding_window'), _llama_options, _llama_weights),
    'qwen2': Family('Qwen2ForCausalLM', (*LLAMA_KEYS, *WINDOW_KEYS), _llama_options, _llama_weights),
    'qwen3': Family('Qwen3ForCausalLM', (*LLAMA_KEYS, *WINDOW_KEYS, 'attention_bias'), _llama_options, _llama_weights),
    'gpt2': Family(
        'GPT2LMHeadModel',
        (
            'vocab_size', 'n_positions', 'n_ctx', 'n_embd', 'n_layer', 'n_head', 'n_inner', 'layer_norm_epsilon',
            'initializer_range', 'bos_token_id', 'eos_token_id', 'tie_word_embeddings', 'resid_pdrop', 'embd_pdrop',
            'attn_pdrop', 'summary_type', 'summary_use_proj', 'summary_activation', 'summary_first_dropout',
            'summary_proj_to_labels',
        ),
        _gpt2_options,
        _gpt2_weights,
    ),
}  # fmt: skip


def load_dense(source: Any) -> PreTrainedModel:
    """The model in a folder or of a hub id, in the dtype that it is stored in; its family is checked first.

    Raises:
        ValueError: there is none, or one of a family that is not supported.
    """

    def read(kind: type[AutoConfig] | type[AutoModelForCausalLM], **options: Any) -> Any:
        try:
            return kind.from_pretrained(source, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f'{WHERE}: {source}: not loaded ({" ".join(str(error).split())[:200]})') from None

    family_of(read(AutoConfig), str(source))
    return read(AutoModelForCausalLM, torch_dtype='auto')


def family_of(config: PretrainedConfig, name: str) -> Family:
    """The family of a config.

    Raises:
        ValueError: it is not supported; ``name`` is what the message calls the model.
    """
    if config.model_type == 'itt':
        raise ValueError(f'{WHERE}: {name} is a model of this package; load it with ITTForCausalLM.from_pretrained')
    if config.model_type not in FAMILIES:
        raise ValueError(
            f'{WHERE}: {name} is of the family {config.model_type or type(config).__name__}; supported are '
            f'{", ".join(FAMILIES)}'
        )
    return FAMILIES[config.model_type]


def dense_options(source: PreTrainedModel, thinking: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model with ``source``'s shape and the thinking options given.

    Raises:
        ValueError: ``source`` is no supported causal language model, its config asks for what the block does not
            compute, or an option is one of the shape.
    """
    if not isinstance(source, PreTrainedModel):
        raise ValueError(
            f'{WHERE}: expected a model of transformers, a folder or a hub id, got a {type(source).__name__}'
        )
    config, name = source.config, source.config._name_or_path or type(source).__name__
    family = family_of(config, name)
    if family.causal_lm not in (kind.__name__ for kind in type(source).__mro__):
        raise ValueError(
            f'{WHERE}: expected a {family.causal_lm}, got a {type(source).__name__}, which has no language-modelling '
            'head; load it with AutoModelForCausalLM.from_pretrained'
        )
    options = shape_options(config, name)
    fixed = [key for key in thinking if key in options]
    if fixed:
        raise ValueError(f'{WHERE}: {fixed[0]} is that of the model that is copied; leave it out')
    return {**options, **initial_values(thinking.get('thinking')), **thinking}


def shape_options(config: PretrainedConfig, name: str) -> dict[str, Any]:
    """The options of the decoder that computes what a model with ``config`` does.

    Raises:
        ValueError: another family, or a config key that this decoder cannot represent; ``name`` is what the message
            calls the model.
    """
    family = family_of(config, name)
    _check_keys(config, family)
    options = family.options(config)
    try:
        ModelOptions(**options)
    except ValueError as error:
        raise ValueError(f'{WHERE}: {name}: {error}') from None
    return options


def initial_values(thinking: str | None) -> dict[str, float]:
    """The initial values with which a model that thinks starts as the dense one."""
    return {'step_encoding_init': 0.0, **({'residual_scale_init': 1.0} if thinking == 'residual_scale' else {})}


def _check_keys(config: PretrainedConfig, family: Family) -> None:
    """Refuse each key that is neither read nor neutral and differs from the class's default.

    A key that the class does not know is refused too where it is a number, true or a structure: other versions of the
    family's code may read it.
    """
    defaults = type(config)().to_dict()
    for key, value in config.to_dict().items():
        default = defaults.get(key)
        if key in family.keys or key in NEUTRAL or value == default or value in EQUIVALENT.get(key, ()):
            continue
        if key not in defaults and (not value or isinstance(value, str)):
            continue
        raise ValueError(
            f'{WHERE}: config key {key} is {value!r}, and this decoder has only {default!r}; if the key changes '
            'nothing that the model computes, delete it from its config'
        )


def changes_logits(config: ITTConfig) -> str:
    """Which option makes an untrained model's logits differ from the dense model's; empty where none does."""
    if config.thinking == 'loop':
        return 'thinking: loop'
    if config.thinking == 'residual_scale' and config.first_encoding_init != 1:
        return f'residual_scale_init: {config.first_encoding_init:g}'
    if config.thinking != 'itt':
        return ''
    if not config.step_encoding:
        return 'step_encoding: false'
    if config.first_encoding_init != 1:
        return f'residual_scale_init: {config.first_encoding_init:g}'
    if config.step_encoding_init:
        return f'step_encoding_init: {config.step_encoding_init:g}'
    if not config.residual_thinking:
        return 'residual_thinking: false'
    return 'reweighting: symmetric' if config.reweighting == 'symmetric' and config.token_routing else ''


def fill_new_parameters(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Give what is still on the meta device, that of thinking layers, its initial values."""
    for module in model.modules():
        own: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not any(tensor.is_meta for tensor in own):
            continue
        module.to_empty(device=device, recurse=False)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        model._init_weights(module)
        torch.rand((), device=device)  # So that the next router's numbers, which start from here, are others.


def block_name(name: str, config: ITTConfig) -> str:
    """A dense weight's name in a model with ``config``, where it may stand in a thinking layer's block."""
    layer = re.match(r'model\.layers\.(\d+)\.', name)
    return name if layer is None else f'model.{layer_name(config, int(layer[1]))}.{name[layer.end() :]}'
