"""Adapters of PEFT hold what belongs to a thinking layer: thresholds, routers and step encodings.

PEFT saves the entries of ``state_dict`` that have the adapter's prefix in their name, such as ``lora_``. So a layer
whose block has an adapter adds its own tensors under such a name, and takes them back when they are loaded::

    layers.0.threshold_T  ->  layers.0.lora_thinking.<adapter>.threshold_T

The model has one set of them, that of the adapter loaded or trained last. ``disable_adapter`` leaves it as it is.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_OF_PEFT = re.compile(r'\.((?:lora|ia3|hada|lokr|oft|boft)_)\w+\.([^.]+)')
_ADDED = re.compile(r'[a-z0-9]+_thinking\.[^.]+\.(\w+)$')


def add_to_adapters(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of ``state_dict``: the layer's own tensors once more for each adapter in its block."""
    adapters = {match.groups() for name, _ in module.named_parameters() if (match := _OF_PEFT.search(name))}
    own = [*module._parameters, *module._buffers]
    for kind, adapter in sorted(adapters):
        for name in own:
            if f'{prefix}{name}' in state:
                state[f'{prefix}{kind}thinking.{adapter}.{name}'] = state[f'{prefix}{name}'].clone()


def take_from_adapters(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of ``load_state_dict``: the layer's own tensors as an adapter holds them."""
    for key in [key for key in state if key.startswith(prefix)]:
        if match := _ADDED.fullmatch(key[len(prefix) :]):
            state[f'{prefix}{match[1]}'] = state.pop(key)
