"""The one place where the model meets Composer.

Registered with LLM-Foundry as the model ``itt_causal_lm`` through this package's entry points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from composer.models import HuggingFaceModel
from llmfoundry.metrics import DEFAULT_CAUSAL_LM_EVAL_METRICS, DEFAULT_CAUSAL_LM_TRAIN_METRICS
from llmfoundry.models.hf.hf_fsdp import hf_get_init_device
from llmfoundry.utils.builders import build_metric
from torch import nn
from transformers import PreTrainedTokenizerBase

from itt_composer.config.pretrained import SHAPE
from itt_composer.flops import Decoder, training_flops
from itt_composer.model import (
    DecoderBlock,
    ITTConfig,
    ITTForCausalLM,
    ITTLayer,
    LoopLayer,
    ResidualScaleLayer,
    compiled,
)
from itt_composer.model.pretrained_dense import check_complete
from itt_composer.options import ModelOptions


class ComposerITTForCausalLM(HuggingFaceModel):
    """A dense, Loop or ITT language model for Composer's Trainer, with foundry's causal-LM metrics.

    FSDP shards each decoder layer as one unit: one all-gather serves all passes of a thinking layer (of a block of
    several, all layers of it).
    Activation checkpointing recomputes each pass of a decoder block by itself, never the routing between the passes,
    so the backward pass has the routed tokens of the forward pass. It must not be
    reentrant: that loses the gradients of keys and values that later steps see (a training config with it is refused).
    Evaluation routes by ``evaluation_selection``; the callback ``causal_gap`` also logs the loss under ``selection``.

    Args:
        tokenizer: its vocabulary must fit into the model's; saved in the checkpoints.
        pretrained: folder or hub id of the model to start from; ``model_options`` then say its shape too, as
            :func:`itt_composer.config.pretrained.fill_in_pretrained` fills it in.
        init_device: ``cpu``, or with FSDP ``meta`` (initialise after sharding) or ``mixed`` (rank 0 initialises).
        use_train_metrics: compute foundry's metrics on training batches too, for which the logits of all tokens are
            stored; without them the loss is computed in chunks (``loss_chunk_tokens``).
        compile_blocks: compile the training passes of each decoder block, and the chunked loss
            (:func:`compile_blocks`); true, or the name of a backend of ``torch.compile``.
        autocast_residual: under autocast, hidden states have its dtype, as with FSDP's ``param_dtype``; false: on one
            GPU they are float32.
        additional_train_metrics: names of more metrics from foundry's registry.
        additional_eval_metrics: the same, for evaluation.
        **model_options: keys of :class:`ITTConfig`.

    Raises:
        ValueError: for an unknown key (with the nearest known one), a bad value, or a vocabulary that is too small.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pretrained: str | None = None,
        init_device: str = 'cpu',
        use_train_metrics: bool = True,
        compile_blocks: bool | str = False,
        autocast_residual: bool = False,
        additional_train_metrics: list[str] | None = None,
        additional_eval_metrics: list[str] | None = None,
        **model_options: Any,
    ):
        config = ITTConfig.from_options('model', **model_options)
        if tokenizer is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(
                f'model.vocab_size: {config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens; set it to the '
                "tokenizer's, or convert the data with another tokenizer"
            )
        if pretrained is None:
            with torch.device(hf_get_init_device(init_device)):
                model = ITTForCausalLM(config)
        else:
            model = _pretrained(pretrained, config)
        model.model.autocast_residual = autocast_residual
        if compile_blocks:
            compiled.compile_blocks(model, 'inductor' if compile_blocks is True else compile_blocks)
        model.fsdp_wrap_fn = is_decoder_layer
        model.activation_checkpointing_fn = is_decoder_block
        model.param_init_fn = model._init_weights
        train_metrics = [*DEFAULT_CAUSAL_LM_TRAIN_METRICS, *(additional_train_metrics or [])]
        eval_metrics = [*DEFAULT_CAUSAL_LM_EVAL_METRICS, *(additional_eval_metrics or [])]
        super().__init__(
            model=model,
            tokenizer=tokenizer,
            use_logits=True,
            metrics=[build_metric(name, {}) for name in train_metrics] if use_train_metrics else [],
            eval_metrics=[build_metric(name, {}) for name in eval_metrics],
            shift_labels=True,
        )

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Loss and logits of a batch; in training the loss alone, unless training metrics need the logits."""
        if self.tokenizer is not None and self.tokenizer.padding_side == 'left' and 'attention_mask' in batch:
            # Positions count from a text's own first token.
            batch = {**batch, 'position_ids': (batch['attention_mask'].cumsum(-1) - 1).clamp(min=0)}
        if self.training and not self.train_metrics:
            batch = {**batch, 'with_logits': False}
        return super().forward(batch)

    def flops_per_batch(self, batch: Any) -> float:
        """Exact FLOPs of training on ``batch`` (forward and backward), at the present token ratios."""
        B, S = batch['input_ids'].shape
        state = self.model.routing
        ratios = state.ratios_T(self.training) if state else None
        decoder = Decoder.from_model_config(self.config.to_dict())
        return float(B * training_flops(decoder, S, ratios))


def _pretrained(source: str, config: ITTConfig) -> ITTForCausalLM:
    """The model of ``config`` with the weights of ``source``, in float32."""
    stored, _ = ITTConfig.get_config_dict(source)
    if stored['model_type'] == ITTConfig.model_type:
        model, report = ITTForCausalLM.from_pretrained(
            source, config=config, torch_dtype=torch.float32, output_loading_info=True
        )
        check_complete(f'model.pretrained: {source}', report, 'export it again')
        return model
    options = {key: getattr(config, key) for key in ModelOptions.keys() if key not in SHAPE}
    model = ITTForCausalLM.from_pretrained_dense(source, **options).float()
    model.config.torch_dtype = torch.float32
    return model


def is_decoder_layer(module: nn.Module) -> bool:
    """Whether FSDP should shard ``module`` as a unit: a complete dense, Loop or ITT layer."""
    return isinstance(module, (DecoderBlock, LoopLayer, ITTLayer, ResidualScaleLayer)) and bool(module.is_decoder_layer)


def is_decoder_block(module: nn.Module) -> bool:
    """Whether to checkpoint the activations of ``module``: each pass of the block by itself."""
    return isinstance(module, DecoderBlock)
