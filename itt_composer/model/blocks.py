"""Thinking in blocks (Section 3.1): what a step repeats is one decoder layer, or several consecutive ones.

A layer keeps its number wherever it runs, so the last number in a parameter's name is its layer's::

    a dense layer               layers.1.self_attn.q_proj.weight
    a block of one layer        layers.0.block.self_attn.q_proj.weight
    layer 3 of block [2, 3]     layers.2.block.3.self_attn.q_proj.weight; layers.3 is an empty InnerLayer

R sequences of K tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from itt_composer.model.block import DecoderBlock, KeyValue, Trace
from itt_composer.model.cache import PassCache
from itt_composer.model.config import ITTConfig
from itt_composer.model.rotary import Rotation
from itt_composer.model.selection import Selection

BlockKeyValue = KeyValue | tuple[KeyValue, ...]
"""Keys and values after a pass of a block: those of its one layer, or of each of its layers."""


class LayerStack(nn.ModuleDict):
    """Decoder layers that run one after another on the same tokens, each with keys and values of its own.

    Args:
        config: the model's.
        layers: their numbers, counted from 0, under which the layers are stored.
    """

    def __init__(self, config: ITTConfig, layers: list[int]):
        super().__init__({str(i): DecoderBlock(config) for i in layers})

    def forward(
        self,
        x_RKD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        past_kv: tuple[KeyValue, ...] | None = None,
        routed: Selection | None = None,
        cache: PassCache | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """One pass of all layers; arguments as in :meth:`DecoderBlock.forward`, ``past_kv`` of each layer."""
        new_kv: list[KeyValue] = []
        for n, (i, layer) in enumerate(self.items()):
            if n and trace is not None and trace.hidden_states is not None:
                trace.hidden_states.append(x_RKD)
            past, own_cache = past_kv and past_kv[n], cache and cache.of(int(i))
            x_RKD, kv = layer(x_RKD, rotation, padding_BS, past, routed, own_cache, trace=trace)
            new_kv.append(kv)
        return x_RKD, tuple(new_kv)


class InnerLayer(nn.Module):
    """Holds the place, in the decoder's list, of a layer that runs inside an earlier layer's block."""

    def forward(self, x_BSD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """The hidden states as they are."""
        return x_BSD, None


def block_of(config: ITTConfig, layer: int) -> list[int] | None:
    """The layers of the block that layer ``layer`` is in; None for one that no step repeats."""
    return next((block for block in config.thinking_options.thinking_blocks if layer in block), None)


def thinking_block(config: ITTConfig, first: int) -> nn.Module:
    """What the thinking layer ``first`` repeats: a :class:`DecoderBlock`, or a :class:`LayerStack`."""
    layers = block_of(config, first)
    assert layers is not None
    return DecoderBlock(config) if len(layers) == 1 else LayerStack(config, layers)


def layer_name(config: ITTConfig, layer: int) -> str:
    """The name within :class:`ITTModel` of the module that holds the weights of the dense model's layer ``layer``."""
    block = block_of(config, layer)
    if block is None:
        return f'layers.{layer}'
    return f'layers.{block[0]}.block' + (f'.{layer}' if len(block) > 1 else '')
