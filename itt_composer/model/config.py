"""Configuration of a dense, Loop or ITT decoder."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from itt_composer.checks import check_keys, check_mapping, check_value
from itt_composer.deprecated import current_names
from itt_composer.options import ModelOptions


class ITTConfig(PretrainedConfig):
    """The options of :class:`ModelOptions`, as attributes, in the form that transformers saves and loads.

    Args:
        **options: keys of :class:`ModelOptions`, and what any ``PretrainedConfig`` takes.

    Raises:
        ValueError: for a value that :class:`ModelOptions` rejects.
    """

    model_type = 'itt'

    calibrated_thresholds: dict[str, list[list[float]]] | None = None
    """Thresholds for other ratios than the trained ones, per thinking layer and step, by ``0.7/0.7/0.9``."""

    pretrained_from: str | None = None
    """The folder, hub id or family of the model that ``from_pretrained_dense`` copied."""

    def __init__(self, **options: Any):
        options = current_names(options)
        self._set(ModelOptions(**{key: options.pop(key) for key in ModelOptions.keys() if key in options}))
        special = ('bos_token_id', 'eos_token_id', 'tie_word_embeddings')
        super().__init__(**{key: getattr(self, key) for key in special}, **options)

    def check(self) -> None:
        """Check the values together; some may have been set after the construction, as ``from_pretrained`` does.

        Raises:
            ValueError: one line that names the key.
        """
        options = self.thinking_options
        self._set(options)
        check_mapping('calibrated_thresholds', self.calibrated_thresholds)
        L, T = len(options.thinking_blocks), options.steps
        for ratios, threshold_LT in (self.calibrated_thresholds or {}).items():
            key = f'calibrated_thresholds: {ratios}'
            check_value(key, threshold_LT, 'list[list[float]]')
            if [len(own_T) for own_T in threshold_LT] != [T] * L:
                raise ValueError(f'{key}: expected {T} numbers for each of {L} thinking layers; run itt calibrate')

    def _set(self, options: ModelOptions) -> None:
        for key in ModelOptions.keys():
            setattr(self, key, getattr(options, key))

    @property
    def thinking_options(self) -> ModelOptions:
        """The options, checked and filled in."""
        return ModelOptions(**current_names({key: getattr(self, key) for key in ModelOptions.keys()}))

    @property
    def first_encoding_init(self) -> float:
        """Initial value of phi[0]."""
        if self.residual_scale_init is not None:
            return self.residual_scale_init
        return 2.0 if self.thinking == 'residual_scale' else 1.0

    @property
    def is_llama(self) -> bool:
        """Whether transformers' LLaMA computes this model, so that it is saved as one, without code of its own."""
        parts = (self.thinking, self.norm, self.mlp, self.position, self.qk_norm)
        return parts == ('none', 'rmsnorm', 'swiglu', 'rotary', False) and self.qkv_bias == self.o_bias

    @classmethod
    def from_options(cls, where: str, **options: Any) -> ITTConfig:
        """A config from a user's keys, none of which may be unknown.

        ``PretrainedConfig`` itself keeps keys that it does not know, so a misspelt option would train another model.

        Args:
            where: what the message of the ValueError names as the place of the key.
            **options: the keys.

        Raises:
            ValueError: for an unknown key, with the nearest known one, or a bad value.
        """
        options = current_names(options)
        check_keys(options, ModelOptions.keys(), where)
        return cls(**options)
