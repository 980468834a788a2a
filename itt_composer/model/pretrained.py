"""What the base model and the language model share: how transformers makes, loads and saves them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from itt_composer.model.config import ITTConfig
from itt_composer.model.initial_values import initialise
from itt_composer.model.legacy import current_weight_name
from itt_composer.model.saving import SelfContained
from itt_composer.model.thinking_setting import ThinkingSettings


class ITTPreTrainedModel(ThinkingSettings, SelfContained, PreTrainedModel):
    """A dense, Loop or ITT model of transformers, with or without a head."""

    config_class = ITTConfig
    base_model_prefix = 'model'
    supports_gradient_checkpointing = True
    _no_split_modules = ['DecoderBlock', 'LoopLayer', 'ITTLayer', 'ResidualScaleLayer']  # noqa: RUF012 (the form transformers has)
    _supports_sdpa = True
    _supports_cache_class = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute each pass of a block in the backward pass, never the routing between the passes.

        Args:
            gradient_checkpointing_kwargs: for ``torch.utils.checkpoint``; ``use_reentrant`` is False by default.
        """
        super().gradient_checkpointing_enable({'use_reentrant': False, **(gradient_checkpointing_kwargs or {})})

    @staticmethod
    def _fix_state_dict_key_on_load(key: str) -> tuple[str, bool]:
        """Called by ``from_pretrained`` for each weight in a folder."""
        name = current_weight_name(key)
        return name, name != key

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of the parameters and buffers that ``module`` itself holds; see :class:`ITTConfig`."""
        initialise(module, self.config)
