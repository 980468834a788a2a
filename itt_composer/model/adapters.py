"""Adapters of PEFT hold what belongs to a thinking layer: thresholds, routers and step encodings.

PEFT saves the entries of ``state_dict`` that are below an adapter's own modules, such as ``lora_A``. So a layer whose
block has an adapter adds its own tensors under such a name, and takes them back when they are loaded::

    layers.0.threshold_T  ->  layers.0.block.self_attn.q_proj.lora_dropout.<adapter>.threshold_T

The model has one set of them, that of the adapter loaded or trained last. ``disable_adapter`` leaves it as it is.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def add_to_adapters(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of ``state_dict``: the layer's own tensors once more for each adapter in its block."""
    for place in adapters_in(module).values():
        for name in _own(module):
            if f'{prefix}{name}' in state:
                state[f'{prefix}{place}{name}'] = state[f'{prefix}{name}'].clone()


def adapters_in(module: nn.Module) -> dict[str, str]:
    """The adapters in a layer's block, each with the prefix under which it holds the layer's own tensors."""
    places: dict[str, str] = {}
    for path, layer in module.named_modules():
        for parts in getattr(layer, 'adapter_layer_names', ()):
            if parts == 'modules_to_save':  # A trained copy of a module: PEFT saves only the module's own tensors.
                continue
            if isinstance(held := getattr(layer, parts, None), (nn.ModuleDict, nn.ParameterDict)):
                # PEFT takes a vector below lora_A for an incomplete matrix.
                below = 'lora_dropout' if parts.startswith('lora_') else parts
                for adapter in held:
                    places.setdefault(adapter, f'{path}.{below}.{adapter}.')
    return places


def take_from_adapters(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of ``load_state_dict``: the layer's own tensors as an adapter holds them."""
    for key in [key for key in state if key.startswith(prefix)]:
        place, name = key[len(prefix) :].rpartition('.')[::2]
        if place and name in _own(module):
            state[f'{prefix}{name}'] = state.pop(key)


def bring_thresholds(state: dict[str, Any], prefix: str) -> bool:
    """Whether adapters below ``prefix`` hold thresholds in ``state``."""
    own = re.compile(re.escape(prefix) + r'layers\.\d+\.threshold_T')
    return any(key.startswith(prefix) and key.endswith('.threshold_T') and not own.fullmatch(key) for key in state)


def _own(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]
