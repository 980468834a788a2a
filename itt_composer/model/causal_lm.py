"""The language model: the decoder and its head.

B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from itt_composer.model.cache import ThinkingCache
from itt_composer.model.config import ITTConfig
from itt_composer.model.decoder import ITTDecoder
from itt_composer.model.initial_values import initialise
from itt_composer.model.legacy import current_weight_name
from itt_composer.model.loss import IGNORED, chunked_cross_entropy
from itt_composer.model.saving import SelfContained
from itt_composer.model.thinking_setting import ThinkingSettings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class ITTForCausalLM(ThinkingSettings, SelfContained, PreTrainedModel, GenerationMixin):
    """A dense, Loop or ITT language model; which one is ``config.thinking``.

    The dense baseline's parameters have the names of ``LlamaForCausalLM``'s; in a layer that thinks the same names
    stand under ``block``.
    """

    config_class = ITTConfig
    base_model_prefix = 'model'
    _no_split_modules = ['DecoderBlock', 'LoopLayer', 'ITTLayer', 'ResidualScaleLayer']  # noqa: RUF012 (the form transformers has)
    _tied_weights_keys = ['lm_head.weight']  # noqa: RUF012
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(self, config: ITTConfig):
        super().__init__(config)
        config.check()
        self.model = ITTDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._use_calibrated_thresholds()

    @classmethod
    def from_llama(cls, llama: LlamaForCausalLM, **options: Any) -> ITTForCausalLM:
        """A model with a Hugging Face LLaMA's weights, in its mode and on its device; routers and phi start fresh.

        Args:
            llama: the model to copy from. It is not changed.
            **options: what the model adds to a LLaMA, as :class:`ITTConfig` takes it: thinking options, initial values
                of routers and step encodings.

        Raises:
            ValueError: for an unknown option, one that is the LLaMA's, or a LLaMA with parts that this decoder lacks.
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
        for key in copied:
            if key in options:
                raise ValueError(f'from_llama: {key} is that of the model that is copied; leave it out')
        config = ITTConfig.from_options('from_llama', **{key: getattr(source, key) for key in copied}, **options)
        model = cls(config).to(llama.device, llama.dtype).train(llama.training)
        prefixes = {f'model.layers.{i}.': f'model.layers.{i}.block.' for i in config.thinking_layers}
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
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        with_logits: bool = True,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Next-token logits, and the loss where there are labels.

        Args:
            input_ids: [B, S], with a cache the tokens that follow those in it.
            attention_mask: [B, S] (with a cache over its tokens too), 0 for padding, which is never routed and
                which no other token sees.
            position_ids: [B, S], default 0..S-1, with a cache from its length on.
            labels: [B, S], the tokens themselves (they are shifted here); -100 is left out of the loss.
            past_key_values: what an earlier call returned, or ``model.new_cache()``; it is extended in place.
            use_cache: return a cache even though none is given.
            logits_to_keep: only the logits of the last ``logits_to_keep`` tokens; 0: all.
            return_dict: False for a tuple (loss where there are labels, logits, the cache where there is one).
            with_logits: False where only the loss is wanted, which then needs much less memory
                (``config.loss_chunk_tokens``); the logits are None.
            inputs_embeds, output_attentions, output_hidden_states: there for libraries that pass them to every model;
                None or False.

        Raises:
            ValueError: more tokens than the model has positions, a mask of another size, a cache under a rule that
                is not causal or of another class than this model needs, or one of the last three arguments.
        """
        for name, given in (
            ('inputs_embeds', inputs_embeds is not None),
            ('output_attentions', output_attentions),
            ('output_hidden_states', output_hidden_states),
        ):
            if given:
                raise ValueError(f'{name}: this model does not have it')
        of_this_model = DynamicCache if self.config.thinking == 'none' else ThinkingCache
        if past_key_values is not None and not isinstance(past_key_values, of_this_model):
            raise ValueError(
                f'past_key_values: a {type(past_key_values).__name__} has no place for the thinking steps; leave it '
                'out, or start from model.new_cache()'
            )
        cache = self.new_cache() if past_key_values is None and use_cache else past_key_values
        seen, S = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
        if cache is not None:
            self._require_causal()
        self._check_length(seen + S)
        if attention_mask is not None and attention_mask.shape != (len(input_ids), seen + S):
            raise ValueError(
                f'attention_mask: {list(attention_mask.shape)}, for {len(input_ids)} texts of {seen + S} tokens with '
                'those in the cache'
            )
        if self.training:
            self._forget_calibration()
        self._warn_of_fresh_thresholds()
        position_BS = (
            torch.arange(seen, seen + S, device=input_ids.device)[None] if position_ids is None else position_ids
        )
        padding_BS = None if attention_mask is None else attention_mask.bool()
        if padding_BS is not None and not self.training and padding_BS.all():
            padding_BS = None  # Attention without a mask is faster.
        x_BSD = self.model(input_ids, position_BS, padding_BS, cache, last=logits_to_keep if labels is None else 0)
        # Shifting the labels and not the logits saves two copies of the largest tensor of the step.
        next_BS = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        loss, logits_BSV, chunk = None, None, self.config.loss_chunk_tokens
        if next_BS is not None and not with_logits and chunk:
            loss = chunked_cross_entropy(x_BSD.flatten(0, 1), self.lm_head.weight, next_BS.flatten(), chunk)
        else:
            # The loss is of every token, whatever is kept.
            logits_BSV = self.lm_head(x_BSD if labels is not None else x_BSD[:, -logits_to_keep:])
            if next_BS is not None:
                loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), next_BS.flatten())
            logits_BSV = logits_BSV[:, -logits_to_keep:] if with_logits else None
        if return_dict is False:
            return tuple(part for part in (loss, logits_BSV, cache) if part is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, past_key_values=cache)

    def new_cache(self) -> DynamicCache:
        """An empty cache: transformers' own for the dense baseline, one with a slot per pass for a thinking model."""
        return DynamicCache() if self.config.thinking == 'none' else ThinkingCache(self.config)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' ``generate``: greedy, sampling, beam search; prompts of different length padded on the left.

        Raises:
            ValueError: under a rule that is not causal, or where the text would outgrow the model's positions.
        """
        self._require_causal()
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: DynamicCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of the next ``forward`` in decoding: the tokens that the cache lacks, and where they stand."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = {key: kwargs.get(key) for key in ('attention_mask', 'position_ids', 'use_cache')}
        if inputs['attention_mask'] is not None and inputs['position_ids'] is None:
            inputs['position_ids'] = (inputs['attention_mask'].long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
        elif inputs['position_ids'] is not None:
            # Those that a caller gives are the prompt's; the tokens after it follow.
            given_BS = inputs['position_ids']
            later = torch.arange(1, input_ids.shape[1] - given_BS.shape[1] + 1, device=given_BS.device)
            inputs['position_ids'] = torch.cat((given_BS, given_BS[:, -1:] + later), dim=1)[:, seen:]
        inputs['logits_to_keep'] = kwargs.get('logits_to_keep') or 0
        return {'input_ids': input_ids[:, seen:], 'past_key_values': past_key_values, **inputs}

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        assistant_model: PreTrainedModel | None,
        batch_size: int,
        max_cache_length: int,
        device: torch.device,
    ) -> None:
        """Called by ``generate`` before it decodes: see that the text will fit, and put the right cache in place."""
        self._check_length(max_cache_length)
        if self.config.thinking != 'none' and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise ValueError('cache_implementation: a model that thinks has a cache of its own; leave it out')
            if model_kwargs.get('past_key_values') is None:
                model_kwargs['past_key_values'] = self.new_cache()
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, assistant_model, batch_size, max_cache_length, device
        )

    def _check_length(self, tokens: int) -> None:
        limit = self.config.max_position_embeddings
        if tokens > limit:
            raise ValueError(f'{tokens} tokens, and the model has {limit} positions; shorten the context')

    def get_decoder(self) -> nn.Module:
        """The model without its head, where foundry's ``hf_causal_lm`` and transformers look for it."""
        return self.model

    def set_decoder(self, decoder: ITTDecoder) -> None:
        """Put another decoder in place."""
        self.model = decoder

    @staticmethod
    def _fix_state_dict_key_on_load(key: str) -> tuple[str, bool]:
        """Called by ``from_pretrained`` for each weight in a folder."""
        name = current_weight_name(key)
        return name, name != key

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

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of the parameters and buffers that ``module`` itself holds; see :class:`ITTConfig`."""
        initialise(module, self.config)


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name
