"""A model made from a pretrained decoder of another family.

A family is supported where the block can compute exactly what transformers' model computes. Every key of its config is
therefore either read (:mod:`itt_composer.families`), or known to change nothing, or at the value that transformers has
by default; any other is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from itt_composer.families import FAMILIES, Family
from itt_composer.model.blocks import layer_name
from itt_composer.model.config import ITTConfig
from itt_composer.options import ModelOptions

WHERE = 'from_pretrained_dense'

# Keys that change no logit. Dropout is not in the function that a model computes; it is left out of training too.
NEUTRAL = {
    *vars(GenerationConfig()),
    '_attn_implementation_autoset', '_name_or_path', 'architectures', 'attention_dropout', 'auto_map',
    'decoder_start_token_id', 'dtype', 'finetuning_task', 'id2label', 'is_llama_config', 'label2id', 'model_type',
    'name_or_path', 'output_attentions', 'output_hidden_states', 'pad_token_id', 'prefix', 'pretraining_tp',
    'problem_type', 'return_dict', 'sep_token_id', 'task_specific_params', 'tokenizer_class', 'torch_dtype',
    'torchscript', 'transformers.js_config', 'transformers_version', 'unsloth_fixed', 'use_cache',
}  # fmt: skip

# Values that mean the same as the default.
EQUIVALENT = {'hidden_act': ('swish',), 'partial_rotary_factor': (1.0,), 'activation_function': ('gelu_pytorch_tanh',)}


def load_dense(source: Any) -> PreTrainedModel:
    """The model in a folder or of a hub id, in the dtype that it is stored in; its config is checked first.

    Raises:
        ValueError: there is none, one that this decoder cannot represent, or weights that are missing or do not fit.
    """
    shape_options(read_dense(source), str(source))
    model, report = read_dense(source, AutoModelForCausalLM, torch_dtype='auto', output_loading_info=True)
    check_complete(f'{WHERE}: {source}', report, 'download or save the model again')
    return model


def check_complete(source: Any, report: Mapping[str, Any], advice: str) -> None:
    """Refuse a model some of whose weights were not there: transformers makes them random, and only warns.

    Args:
        source: what the message starts with.
        report: transformers' ``output_loading_info``.
        advice: what the message ends with.

    Raises:
        ValueError: the first weight that is missing.
    """
    if report['missing_keys']:
        name = min(report['missing_keys'])
        raise ValueError(f'{source}: weight {name} is missing, which the model of this config has; {advice}')


def read_dense(source: Any, kind: Any = AutoConfig, **options: Any) -> Any:
    """The config in a folder or of a hub id, or its model.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # A damaged folder may raise any.
        raise ValueError(f'{WHERE}: {source}: not loaded ({" ".join(str(error).split())[:200]})') from None


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
