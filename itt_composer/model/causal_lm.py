"""The decoder and its language-modelling head.

B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from itt_composer.model.block import DecoderBlock, ResidualProjection, RMSNorm, Rotation
from itt_composer.model.config import ITTConfig
from itt_composer.model.thinking import ITTLayer, LoopLayer, thinking_layers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LAYERS: dict[str, type[LoopLayer | ITTLayer]] = {'loop': LoopLayer, 'itt': ITTLayer}


class ITTDecoder(nn.Module):
    """Token embedding, decoder layers of which some think, final norm."""

    def __init__(self, config: ITTConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        thinking = set(config.thinking_options.thinking_layers or [])
        self.layers = nn.ModuleList(
            LAYERS[config.thinking](config, i) if i in thinking else DecoderBlock(config)
            for i in range(config.num_hidden_layers)
        )
        for layer in self.layers:
            layer.is_decoder_layer = True
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids_BS: Tensor, position_BS: Tensor, padding_BS: Tensor | None) -> Tensor:
        """Token ids to final states, [B, S, D]."""
        x_BSD = self.embed_tokens(input_ids_BS)
        rotation = Rotation.at(position_BS, self.config)
        for layer in self.layers:
            x_BSD, _ = layer(x_BSD, rotation, padding_BS)
        return self.norm(x_BSD)


class ITTForCausalLM(PreTrainedModel):
    """A plain, Loop or ITT language model; which one is ``config.thinking``.

    The plain model's parameters have the names of ``LlamaForCausalLM``'s; in a layer that thinks the same names stand
    under ``f``.
    """

    config_class = ITTConfig
    base_model_prefix = 'model'
    _no_split_modules = ['DecoderBlock', 'LoopLayer', 'ITTLayer']  # noqa: RUF012 (the form transformers has)
    _tied_weights_keys = ['lm_head.weight']  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: ITTConfig):
        super().__init__(config)
        self.model = ITTDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._thresholds_seen = False
        self.post_init()

    @property
    def selection(self) -> str | None:
        """The rule that picks the tokens now (another in training than in evaluation); None where none are picked."""
        layers = [layer for layer in thinking_layers(self).values() if layer.router_TD is not None]
        return layers[0].selection if layers else None

    @classmethod
    def from_llama(cls, llama: LlamaForCausalLM, **options: Any) -> ITTForCausalLM:
        """A model with a Hugging Face LLaMA's weights; routers and step encodings start fresh.

        Args:
            llama: the model to copy from. It is not changed.
            **options: thinking options and initial ranges, as :class:`ITTConfig` takes them.

        Raises:
            ValueError: for an unknown option, or a LLaMA with parts that this decoder lacks.
        """
        source = llama.config
        for key, plain in (('attention_bias', False), ('mlp_bias', False), ('hidden_act', 'silu')):
            if getattr(source, key, plain) != plain:
                raise ValueError(f'from_llama: {key} is {getattr(source, key)}, and this decoder has only {plain}')
        if source.rope_scaling and source.rope_scaling.get('rope_type', 'default') != 'default':
            raise ValueError('from_llama: the model scales its rotary embedding, which this decoder does not')
        if source.head_dim != source.hidden_size // source.num_attention_heads:
            raise ValueError(f'from_llama: head_dim {source.head_dim} is not hidden_size / num_attention_heads')
        copied = (
            'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
            'num_key_value_heads', 'max_position_embeddings', 'rms_norm_eps', 'rope_theta', 'initializer_range',
            'bos_token_id', 'eos_token_id', 'tie_word_embeddings',
        )  # fmt: skip
        config = ITTConfig.from_options('from_llama', **{key: getattr(source, key) for key in copied}, **options)
        model = cls(config).to(llama.dtype)
        prefixes = {f'model.layers.{i}.': f'model.layers.{i}.f.' for i in config.thinking_layers}
        weights = {_renamed(name, prefixes): value for name, value in llama.state_dict().items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert all(name.rsplit('.', 1)[-1].startswith(('phi', 'router', 'threshold')) for name in missing), missing
        return model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Next-token logits, and the loss where there are labels.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 for padding, which is never chosen to think and which no other token sees.
            position_ids: [B, S], default 0..S-1.
            labels: [B, S], the tokens themselves (they are shifted here); -100 is left out of the loss.
            return_dict: False for a tuple (loss where there are labels, logits).
        """
        position_BS = (
            torch.arange(input_ids.shape[1], device=input_ids.device)[None] if position_ids is None else position_ids
        )
        padding_BS = None if attention_mask is None else attention_mask.bool()
        if not self.training and not self._thresholds_seen:
            self._warn_of_fresh_thresholds()
        logits_BSV = self.lm_head(self.model(input_ids, position_BS, padding_BS))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if return_dict is False:
            return (logits_BSV,) if loss is None else (loss, logits_BSV)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another token embedding in place."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The language-modelling head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another head in place."""
        self.lm_head = new_embeddings

    def _warn_of_fresh_thresholds(self) -> None:
        """Once, where the ``threshold`` rule is to use thresholds that no training has set."""
        if self.selection != 'threshold':
            return
        self._thresholds_seen = True
        if any(not layer.threshold_updates for layer in thinking_layers(self).values()):
            warnings.warn(
                'selection: threshold, but no training has set the thresholds: every score above 0 is chosen, which is '
                'a weight above 0.5 of a sigmoid router. Train the model, calibrate it '
                '(python -m itt_composer.calibrate), or evaluate with selection: top_k',
                stacklevel=3,
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of the parameters and buffers that ``module`` itself holds; see :class:`ITTConfig`."""
        config = self.config
        if isinstance(module, nn.Linear):
            depth = 2 * config.num_hidden_layers if isinstance(module, ResidualProjection) else 1
            module.weight.normal_(std=config.initializer_range / math.sqrt(depth))
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=config.embedding_initializer_range)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1)
        elif isinstance(module, ITTLayer):
            module.threshold_T.zero_()
            module.threshold_updates.zero_()
            if module.phi_TD is not None:
                module.phi_TD.fill_(1)
            if module.router_TD is not None:
                # Drawn aside, so that plain, Loop and ITT models of one seed start from the same weights elsewhere.
                device = module.router_TD.device
                with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
                    module.router_TD.normal_(std=config.router_initializer_range)


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name
