"""Families of pretrained decoders as options and weights of the one block. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Read under the same name, by all families but GPT-2.
SAME_NAME = (
    'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads', 'max_position_embeddings', 'rms_norm_eps', 'rope_theta', 'rope_scaling',
    'initializer_range', 'bos_token_id', 'eos_token_id', 'tie_word_embeddings',
)  # fmt: skip

Weights = Mapping[str, Any]
"""Tensors by name."""


@dataclass(frozen=True)
class Family:
    """A family of pretrained decoders: its class, the config keys that are read, what they and the weights become."""

    causal_lm: str
    """Name of the class in transformers."""
    keys: tuple[str, ...]
    """Config keys that ``options`` reads, and those that are neutral in this family."""
    options: Callable[[Any], dict[str, Any]]
    weights: Callable[[Weights], Iterable[tuple[str, Any]]]
    """Each weight, or gradient, under the name and in the layout of the dense baseline."""


def _llama_options(config: Any) -> dict[str, Any]:
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


def _check_window(config: Any) -> None:
    """Refuse a sliding window that some token of the longest context would look beyond."""
    window = getattr(config, 'sliding_window', None)
    used = getattr(config, 'use_sliding_window', config.model_type == 'mistral')
    if used and window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f'from_pretrained_dense: sliding_window: {window}, which is less than max_position_embeddings '
            f'({config.max_position_embeddings}), and this decoder attends to all earlier tokens; load the model with '
            f'max_position_embeddings={window}, and pass it here'
        )


def _gpt2_options(config: Any) -> dict[str, Any]:
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


def _gpt2_weights(weights: Weights) -> Iterator[tuple[str, Any]]:
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


LLAMA_KEYS = (*SAME_NAME, 'head_dim')
WINDOW_KEYS = ('use_sliding_window', 'sliding_window', 'max_window_layers')
FAMILIES = {
    'llama': Family('LlamaForCausalLM', (*LLAMA_KEYS, 'attention_bias'), _llama_options, Mapping.items),
    'mistral': Family('MistralForCausalLM', (*LLAMA_KEYS, 'sliding_window'), _llama_options, Mapping.items),
    'qwen2': Family('Qwen2ForCausalLM', (*LLAMA_KEYS, *WINDOW_KEYS), _llama_options, Mapping.items),
    'qwen3': Family('Qwen3ForCausalLM', (*LLAMA_KEYS, *WINDOW_KEYS, 'attention_bias'), _llama_options, Mapping.items),
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
