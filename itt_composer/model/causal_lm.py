"""The language model: the decoder and its head.

B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from itt_composer import ops
from itt_composer.deprecated import warn_renamed
from itt_composer.families import FAMILIES
from itt_composer.model.config import ITTConfig
from itt_composer.model.decoder import ITTModel
from itt_composer.model.loss import IGNORED, chunked_cross_entropy, cross_entropy, loss_and_derivative
from itt_composer.model.pretrained import ITTPreTrainedModel
from itt_composer.model.pretrained_dense import (
    WHERE,
    block_name,
    changes_logits,
    dense_options,
    fill_new_parameters,
    load_dense,
)
from itt_composer.model.routing_state import RoutingState
from itt_composer.options import ModelOptions


class ITTForCausalLM(ITTPreTrainedModel, GenerationMixin):
    """A dense, Loop or ITT language model; which one is ``config.thinking``.

    The dense baseline's parameters have the names of ``LlamaForCausalLM``'s; in a thinking layer the same names
    stand under ``block``.
    """

    accepts_loss_kwargs = True
    loss_and_derivative = staticmethod(loss_and_derivative)
    """Replaced by :func:`.compiled.compile_blocks`."""
    # The form of transformers 5; version 4 reads the keys alone.
    _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}  # noqa: RUF012

    def __init__(self, config: ITTConfig):
        super().__init__(config)
        self.model = ITTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained_dense(cls, source: PreTrainedModel | str | Path, **options: Any) -> ITTForCausalLM:
        """A model with a pretrained decoder's weights, which computes the same logits until it is trained.

        The families are LLaMA, Mistral, Qwen2, Qwen3 and GPT-2. Step encodings start at 0 here, so an ITT model starts
        as the dense model, whatever layers think. These start elsewhere, with a warning: a Loop, and ITT with
        ``step_encoding: false``, ``residual_thinking: false`` or ``reweighting: symmetric``.

        Special ids, the generation config, dtype, device and mode are the source's. Dropout is left out: none is done
        in training either. The embedding of the padding token is trained like any other.

        Args:
            source: a folder, a hub id, or a loaded model, which is not changed. What is loaded here has the dtype that
                it is stored in, and is in evaluation mode.
            **options: what the model adds, as :class:`ITTConfig` takes it: thinking options, initial values of routers
                and step encodings.

        Raises:
            ValueError: for an unknown option, one of the shape, a model that is no decoder or of another family, and
                a config key that this decoder cannot represent.
        """
        model = load_dense(source) if isinstance(source, (str, Path)) else source
        config = ITTConfig.from_options(WHERE, **dense_options(model, options))
        config.pad_token_id, config.torch_dtype = model.config.pad_token_id, model.dtype
        config.pretrained_from = config._name_or_path = model.config._name_or_path or model.config.model_type
        weights, weights_of = model.state_dict(), FAMILIES[model.config.model_type].weights
        if any(weight.is_meta for weight in weights.values()):
            raise ValueError(f'{WHERE}: the model has weights on disk or on the meta device; load it into memory')
        if config.tie_word_embeddings and not torch.equal(
            model.get_output_embeddings().weight, model.get_input_embeddings().weight
        ):
            raise ValueError(
                f'{WHERE}: tie_word_embeddings is true, but the head has other weights than the embedding; set it to '
                "false in the model's config"
            )
        device, dtype, training = model.device, model.dtype, model.training
        generation_config = copy.deepcopy(model.generation_config)
        del model

        with torch.device('meta'):
            new = cls(config)
        # One weight at a time, so that a model that was loaded here is not in memory twice.
        copied = {
            block_name(name, config): weight.clone(memory_format=torch.contiguous_format)
            for key in list(weights)
            for name, weight in weights_of({key: weights.pop(key)})
        }
        missing, unexpected = new.load_state_dict(copied, strict=False, assign=True)
        if unexpected:
            raise ValueError(f'{WHERE}: weight {unexpected[0]} has no place in this decoder; use the base model')
        assert all(name.rsplit('.', 1)[-1].startswith(('phi', 'router', 'threshold')) for name in missing), missing
        new.tie_weights()
        fill_new_parameters(new, device, dtype)
        new.generation_config = generation_config
        changes = changes_logits(config)
        if changes:
            warnings.warn(f'{WHERE}: {changes} starts from other logits than the dense model', stacklevel=2)
        return new.train(training)

    @classmethod
    def from_llama(cls, llama: PreTrainedModel, **options: Any) -> ITTForCausalLM:
        """The name of :meth:`from_pretrained_dense` in the last release, with its initial step encodings."""
        warn_renamed('ITTForCausalLM.from_llama is now from_pretrained_dense, whose step_encoding_init is 0')
        return cls.from_pretrained_dense(llama, **{'step_encoding_init': ModelOptions.step_encoding_init, **options})

    @property
    def routing(self) -> RoutingState | None:  # type: ignore[override]
        """How tokens are routed now; None for a model without ITT layers."""
        return self.model.routing

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        with_logits: bool = True,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Next-token logits, and the loss where there are labels.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, use_cache, inputs_embeds, output_attentions,
                output_hidden_states: as in :meth:`ITTModel.forward`.
            labels: [B, S], the tokens themselves (they are shifted here); -100 is left out of the loss.
            logits_to_keep: only the logits of the last ``logits_to_keep`` tokens; 0: all.
            return_dict: False for a tuple of what is not None (the loss first, then logits).
            with_logits: False where only the loss is wanted, which then needs much less memory
                (``config.loss_chunk_tokens``); the logits are None.
            num_items_in_batch: what the sum of the losses is divided by instead of the number of labels: that of the
                batch of which this call is one part (Trainer passes it).
            **kwargs: passed on to the base model.

        Raises:
            ValueError: as :meth:`ITTModel.forward` does.
        """
        states = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            last=logits_to_keep if labels is None else 0,
            **kwargs,
        )
        x_BSD = states.last_hidden_state
        # Shifting the labels and not the logits saves two copies of the largest tensor of the step.
        next_BS = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        loss, logits_BSV, chunk = None, None, self.config.loss_chunk_tokens
        if next_BS is not None and not with_logits and chunk:
            x_ND, next_N = x_BSD.flatten(0, 1), next_BS.to(x_BSD.device).flatten()
            loss = chunked_cross_entropy(
                x_ND, self.lm_head.weight, next_N, chunk, num_items_in_batch, self.loss_and_derivative
            )
        else:
            # The loss is of every token, whichever logits are returned.
            logits_BSV = self.lm_head(x_BSD if labels is not None else ops.last_tokens(x_BSD, logits_to_keep))
            if next_BS is not None:
                next_N = next_BS.to(logits_BSV.device).flatten()
                loss = cross_entropy(logits_BSV.flatten(0, 1), next_N, num_items_in_batch)
            logits_BSV = ops.last_tokens(logits_BSV, logits_to_keep) if with_logits else None
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=states.past_key_values,
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def new_cache(self) -> DynamicCache:
        """An empty cache; see :meth:`ITTModel.new_cache`."""
        return self.model.new_cache()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' ``generate``: greedy, sampling, beam search; prompts of different length padded on the left.

        Raises:
            ValueError: with non-causal routing, or where the text would outgrow the model's positions.
        """
        self._require_causal()
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next ``forward`` in decoding: the tokens that the cache lacks, and where they stand.

        ``inputs_embeds`` are those of the prompt. The last ``len(cache_position)`` tokens are the new ones; a cache may
        hold more than ``input_ids`` does, where a caller has put embeddings before them.
        """
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        N = input_ids.shape[1] - seen if cache_position is None else len(cache_position)
        inputs: dict[str, Any] = {
            'past_key_values': past_key_values,
            'logits_to_keep': kwargs.get('logits_to_keep') or 0,
        }
        if inputs_embeds is not None and seen == 0:
            later_BSD = self.get_input_embeddings()(input_ids[:, input_ids.shape[1] + inputs_embeds.shape[1] - N :])
            inputs['inputs_embeds'] = torch.cat((inputs_embeds, later_BSD.to(inputs_embeds.dtype)), dim=1)
        else:
            inputs['input_ids'] = input_ids[:, input_ids.shape[1] - N :]
        inputs |= {key: kwargs.get(key) for key in ('attention_mask', 'position_ids', 'use_cache')}
        if inputs['position_ids'] is not None:
            # Those that a caller gives are the prompt's; the tokens after it follow.
            given_BS = inputs['position_ids']
            later = torch.arange(1, seen + N - given_BS.shape[1] + 1, device=given_BS.device)
            inputs['position_ids'] = torch.cat((given_BS, given_BS[:, -1:] + later), dim=1)[:, seen:]
        elif inputs['attention_mask'] is not None:
            inputs['position_ids'] = (inputs['attention_mask'].long().cumsum(-1) - 1).clamp(min=0)[:, -N:]
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *others: Any
    ) -> None:
        """Called by ``generate`` before it decodes: see that the text will fit, and put the right cache in place.

        Of ``others``, which differ between versions of transformers, the third is the length of the text in the end.
        """
        self.model.check_length(others[2])
        if getattr(generation_config, 'assistant_early_exit', None) is not None and self.config.thinking != 'none':
            raise ValueError('assistant_early_exit: not supported by a model with extra steps; leave it out')
        if self.config.thinking != 'none' and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise ValueError('cache_implementation: a model with extra steps has its own cache; leave it out')
            if model_kwargs.get('past_key_values') is None:
                model_kwargs['past_key_values'] = self.new_cache()
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *others)

    def get_decoder(self) -> nn.Module:
        """The model without its head, where foundry's ``hf_causal_lm`` and transformers look for it."""
        return self.model

    def set_decoder(self, decoder: ITTModel) -> None:
        """Put another decoder in place."""
        self.model = decoder

    def get_output_embeddings(self) -> nn.Module:
        """The language-modelling head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another head in place."""
        self.lm_head = new_embeddings
