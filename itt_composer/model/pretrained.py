"""What the base model and the language model share: how transformers makes, loads and saves them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from itt_composer.model.adapters import adapters_in
from itt_composer.model.config import ITTConfig
from itt_composer.model.initial_values import initialise
from itt_composer.model.legacy import current_weight_name
from itt_composer.model.saving import AUTO_MAP, MODELING, own_source
from itt_composer.model.thinking import thinking_layers
from itt_composer.model.thinking_setting import ThinkingSettings, thinking_setting
from itt_composer.options import ModelOptions


class ITTPreTrainedModel(ThinkingSettings, PreTrainedModel):
    """A dense, Loop or ITT model of transformers, with or without a head."""

    config_class = ITTConfig
    base_model_prefix = 'model'
    supports_gradient_checkpointing = True
    _no_split_modules = ['DecoderBlock', 'LoopLayer', 'ITTLayer', 'ResidualScaleLayer']  # noqa: RUF012 (the form transformers has)
    _supports_sdpa = True
    _supports_cache_class = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Transformers' ``from_pretrained``; ``token_ratios`` are set as :meth:`set_thinking` sets them.

        Raises:
            ValueError: another family's model, or ratios that the model has no thresholds for.
        """
        stored = _stored_config(pretrained_model_name_or_path, kwargs)
        family = stored.get('model_type', 'itt')
        if family != 'itt':
            raise ValueError(
                f'from_pretrained: {pretrained_model_name_or_path} holds a model of the family {family}; load it with '
                'AutoModelForCausalLM.from_pretrained, or with extra steps: ITTForCausalLM.from_pretrained_dense'
            )
        config, ratios = kwargs.get('config'), None
        if stored.get('thinking') == 'itt':
            if isinstance(config, ITTConfig):
                trained = ITTConfig.from_dict(stored).token_ratios
                if config.token_ratios != trained:
                    ratios, config = config.token_ratios, copy.deepcopy(config)
                    config.token_ratios = trained
                    kwargs['config'] = config
            else:
                ratios = kwargs.pop('token_ratios', None)
                options = {key: value for key, value in kwargs.items() if key in ModelOptions.keys()}
                config = ITTConfig.from_dict({**stored, **options})
            if ratios is not None:
                thinking_setting(config, ratios)  # Before the weights are read.
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _read_offloaded_thresholds(model)
        if ratios is not None:
            model.set_thinking(ratios)
        return loaded

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **options: Any) -> None:
        """Transformers' ``save_pretrained``; writes ``modeling_itt.py`` too, and points to it in ``config.json``."""
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / f'{MODELING}.py').write_text(own_source(), encoding='utf-8')
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)

    def _get_files_timestamps(self, working_dir: Any) -> dict[str, float]:
        """Called by ``save_pretrained`` with ``push_to_hub``, which uploads what is newer than these files."""
        return {
            name: time for name, time in super()._get_files_timestamps(working_dir).items() if name != f'{MODELING}.py'
        }

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # PEFT sets this once it has frozen all but its own parameters. Routers and step encodings are new as well, and
        # an adapter in their layer holds them.
        if name == 'peft_config' and not all(config.inference_mode for config in value.values()):
            for layer in filter(adapters_in, thinking_layers(self).values()):
                for parameter in layer.parameters(recurse=False):
                    parameter.requires_grad_(True)

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


def _stored_config(path: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What ``config.json`` holds; empty where there is none, of which transformers itself will say more."""
    hub = ('cache_dir', 'force_download', 'local_files_only', 'proxies', 'revision', 'subfolder', 'token')
    try:
        return ITTConfig.get_config_dict(path, **{key: options[key] for key in hub if key in options})[0]
    except (OSError, TypeError):
        return {}


def _read_offloaded_thresholds(model: nn.Module) -> None:
    """Give layers on disk their thresholds: accelerate keeps buffers in memory there, without reading them."""
    for layer in thinking_layers(model).values():
        outer = getattr(layer, '_hf_hook', None)
        for hook in getattr(outer, 'hooks', [outer]):
            weights = getattr(hook, 'weights_map', None) or {}
            for name, buffer in layer.named_buffers(recurse=False):
                if name in weights:
                    buffer.copy_(weights[name])
