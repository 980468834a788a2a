"""The base model: token embedding, layers (some of them thinking layers), final norm.

B batch, S sequence, D hidden, H heads, P tokens in the cache, L layers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from itt_composer import ops
from itt_composer.model.adapters import bring_thresholds
from itt_composer.model.block import DecoderBlock, Trace, make_norm
from itt_composer.model.blocks import InnerLayer, block_of
from itt_composer.model.cache import PassCache, ThinkingCache
from itt_composer.model.config import ITTConfig
from itt_composer.model.pretrained import ITTPreTrainedModel
from itt_composer.model.residual_scale import ResidualScaleLayer
from itt_composer.model.rotary import Rotation
from itt_composer.model.routing_state import RoutingState
from itt_composer.model.thinking import ITTLayer, LoopLayer
from itt_composer.model.thresholds import accumulate_seen
from itt_composer.ops.precision import product_dtype


class ITTModel(ITTPreTrainedModel):
    """Token embedding, decoder layers (some of them thinking layers), final norm."""

    autocast_residual = False
    """Whether hidden states have autocast's dtype where it is on; false: that of the embedding."""

    def __init__(self, config: ITTConfig):
        super().__init__(config)
        config.check()
        self.routing = RoutingState.of(config) if config.thinking == 'itt' else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position == 'learned'
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(self._layer(i) for i in range(config.num_hidden_layers))
        for layer in self.layers:
            layer.is_decoder_layer = True
        self.norm = make_norm(config)
        self.post_init()
        self._use_calibrated_thresholds()
        self.register_load_state_dict_pre_hook(_forget_calibration_for_adapters)

    def _layer(self, i: int) -> nn.Module:
        config = self.config
        block = block_of(config, i)
        if block is None:
            return DecoderBlock(config)
        if i > block[0]:
            return InnerLayer()
        if self.routing is not None:
            return ITTLayer(config, i, self.routing)
        return LoopLayer(config, i) if config.thinking == 'loop' else ResidualScaleLayer(config, i)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        last: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Token ids to final hidden states, [B, S, D].

        Args:
            input_ids: [B, S], with a cache the tokens that follow those in it.
            attention_mask: [B, S] (with a cache over its tokens too), 0 for padding, which is never routed and
                which no other token sees.
            position_ids: [B, S], default 0..S-1, with a cache from its length on.
            past_key_values: what an earlier call returned, or ``model.new_cache()``; it is extended in place.
            inputs_embeds: [B, S, D], in place of ``input_ids``.
            use_cache: return a cache even though none is given.
            output_attentions: return the attention weights of each layer's base pass, L of [B, H, S, P + S].
            output_hidden_states: return the embedding's output and each layer's after its last step, the last one after
                the final norm: L + 1 of [B, S, D]. Within a block of several layers they are those of its base pass,
                and the block's last layer has the states after the last step.
            return_dict: False for a tuple of what is not None.
            cache_position: for libraries that pass it; the tokens always follow those in the cache.
            last: only the hidden states of the last ``last`` tokens are needed; 0: all.
            **kwargs: what other models take; a warning names what is not None.

        Raises:
            ValueError: not one of ids and embeddings, more tokens than the model has positions, a mask of another size,
                positions of packed texts, a cache with non-causal routing or of another class than this model needs.
        """
        unused = [name for name, value in kwargs.items() if value is not None and value is not False]
        if unused:
            warnings.warn(f'forward: this model makes no use of {", ".join(sorted(unused))}', stacklevel=2)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wants_all = output_attentions or output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('forward: pass input_ids or inputs_embeds, one of them')
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, S = x_BSD.shape[:2]
        cache = self._checked_cache(past_key_values, use_cache)
        seen = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (B, seen + S):
            raise ValueError(
                f'attention_mask: {list(attention_mask.shape)}, for {B} texts of {seen + S} tokens with those in the '
                'cache'
            )
        if position_ids is not None and S > 1 and not torch.compiler.is_compiling():
            _check_unpacked(position_ids, attention_mask)
        self.check_length(seen + S)
        if self.training and self.routing is not None and getattr(self, '_is_replica', False):
            raise ValueError(
                'nn.DataParallel: the routing thresholds of its replicas are lost; start one process per GPU '
                '(torchrun), or set CUDA_VISIBLE_DEVICES to one GPU'
            )
        if self.training:
            self._forget_calibration()
        self._warn_of_fresh_thresholds()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + S, device=x_BSD.device)[None]
        padding_BS = None if attention_mask is None else attention_mask.bool()
        if padding_BS is not None and not (self.training or torch.compiler.is_exporting()) and padding_BS.all():
            padding_BS = None  # Attention without a mask is faster.

        x_BSD, rotation = self.at_positions(x_BSD, position_ids)
        if self.autocast_residual:
            x_BSD = x_BSD.to(product_dtype(x_BSD))
        hidden_states: list[Tensor] = []
        attentions: list[Tensor] | None = [] if output_attentions else None
        trace = Trace(attentions, hidden_states if output_hidden_states else None) if wants_all else None
        for i, layer in enumerate(self.layers):
            if output_hidden_states and not isinstance(layer, InnerLayer):
                hidden_states.append(x_BSD)
            layer_cache = None if cache is None else PassCache(cache, i)
            if i == len(self.layers) - 1 and isinstance(layer, DecoderBlock) and not wants_all:
                # Of the other tokens only this layer's keys and values are needed.
                x_BSD, _ = layer(x_BSD, rotation, padding_BS, cache=layer_cache, last=last)
            else:
                x_BSD, _ = layer(x_BSD, rotation, padding_BS, cache=layer_cache, trace=trace)
        if self.training:
            accumulate_seen([layer for layer in self.layers if isinstance(layer, ITTLayer)])
        x_BSD = self.norm(x_BSD if wants_all else ops.last_tokens(x_BSD, last))
        output = BaseModelOutputWithPast(
            last_hidden_state=ops.last_tokens(x_BSD, last),
            past_key_values=cache,
            hidden_states=(*hidden_states, x_BSD) if output_hidden_states else None,
            attentions=None if attentions is None else tuple(attentions),
        )
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def at_positions(self, x_BSD: Tensor, position_BS: Tensor) -> tuple[Tensor, Rotation]:
        """Embedded tokens as the first layer takes them at positions [B or 1, S], and the rotation for all layers."""
        if self.embed_positions is not None:
            x_BSD = x_BSD + self.embed_positions(position_BS)
        rotation = Rotation.at(position_BS, self.config)
        # One cast for all layers, to the dtype of their queries and keys; norms of these give float32.
        return x_BSD, rotation if self.config.qk_norm else rotation.to(product_dtype(x_BSD))

    def _checked_cache(self, cache: DynamicCache | None, use_cache: bool | None) -> DynamicCache | None:
        of_this_model = DynamicCache if self.config.thinking == 'none' else ThinkingCache
        if cache is not None and not isinstance(cache, of_this_model):
            raise ValueError(
                f'past_key_values: a {type(cache).__name__} has no place for the extra steps; leave it out, or '
                'start from model.new_cache()'
            )
        if cache is None and use_cache:
            cache = self.new_cache()
        if cache is not None:
            self._require_causal()
        return cache

    def new_cache(self) -> DynamicCache:
        """An empty cache: transformers' own for the dense baseline, one with a slot per pass for a thinking model."""
        return DynamicCache() if self.config.thinking == 'none' else ThinkingCache(self.config)

    def check_length(self, tokens: int) -> None:
        """Raise a ValueError where ``tokens`` are more than the model has positions."""
        limit = self.config.max_position_embeddings
        if tokens > limit:
            raise ValueError(f'{tokens} tokens, and the model has {limit} positions; shorten the context')

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place."""
        self.embed_tokens = value


def _forget_calibration_for_adapters(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(model, ITTModel)
    if bring_thresholds(state, prefix):
        model._forget_calibration('the adapter has thresholds of its own')


def _check_unpacked(position_ids_BS: Tensor, attention_mask_BS: Tensor | None) -> None:
    """Refuse positions that start again within a sequence: several texts are packed into it, as TRL and others do."""
    starts_BS = position_ids_BS.diff() < 0
    if attention_mask_BS is not None:
        mask_BS = attention_mask_BS[:, -position_ids_BS.shape[1] :].bool()
        starts_BS = starts_BS & mask_BS[:, 1:] & mask_BS[:, :-1]
    if starts_BS.any():
        raise ValueError(
            'position_ids: they start again within a sequence, as in packed texts, and this model attends across '
            'those; set packing: false, padding_free: false'
        )
