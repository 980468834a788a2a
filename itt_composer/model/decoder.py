"""The decoder: token embedding, layers of which some think, final norm.

B batch, S sequence, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import DynamicCache

from itt_composer.model.block import DecoderBlock, RMSNorm, Rotation
from itt_composer.model.cache import PassCache
from itt_composer.model.config import ITTConfig
from itt_composer.model.residual_scale import ResidualScaleLayer
from itt_composer.model.routing_state import RoutingState
from itt_composer.model.thinking import ITTLayer, LoopLayer
from itt_composer.model.thresholds import accumulate_seen


class ITTDecoder(nn.Module):
    """Token embedding, decoder layers of which some think, final norm."""

    def __init__(self, config: ITTConfig):
        super().__init__()
        self.config = config
        self.routing = RoutingState.of(config) if config.thinking == 'itt' else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self._layer(i) for i in range(config.num_hidden_layers))
        for layer in self.layers:
            layer.is_decoder_layer = True
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def _layer(self, i: int) -> nn.Module:
        config = self.config
        if i not in (config.thinking_options.thinking_layers or []):
            return DecoderBlock(config)
        if self.routing is not None:
            return ITTLayer(config, i, self.routing)
        return LoopLayer(config, i) if config.thinking == 'loop' else ResidualScaleLayer(config, i)

    def forward(
        self,
        input_ids_BS: Tensor,
        position_BS: Tensor,
        padding_BS: Tensor | None,
        cache: DynamicCache | None = None,
        last: int = 0,
    ) -> Tensor:
        """Token ids to final hidden states of the last ``last`` tokens (0: of all), [B, S, D].

        With a cache the tokens follow those that it holds.
        """
        x_BSD = self.embed_tokens(input_ids_BS)
        rotation = Rotation.at(position_BS, self.config)
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else PassCache(cache, i)
            if i == len(self.layers) - 1 and isinstance(layer, DecoderBlock):
                # Of the other tokens only this layer's keys and values are needed.
                x_BSD, _ = layer(x_BSD, rotation, padding_BS, cache=layer_cache, last=last)
            else:
                x_BSD, _ = layer(x_BSD, rotation, padding_BS, cache=layer_cache)
        if self.training:
            accumulate_seen([layer for layer in self.layers if isinstance(layer, ITTLayer)])
        return self.norm(x_BSD[:, -last:])
