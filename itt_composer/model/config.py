"""Configuration of a plain, Loop or ITT decoder."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig

from itt_composer.checks import check_keys
from itt_composer.deprecated import current_names
from itt_composer.options import (
    NUMBERS,
    ThinkingOptions,
    check_attention_backend,
    check_heads,
    check_numbers,
    check_residual_scale,
)


class ITTConfig(PretrainedConfig):
    """A LLaMA-2 decoder (field names as in ``LlamaConfig``) and the options of :class:`ThinkingOptions`.

    The defaults are the 162M model of Table 5 without thinking.

    Args:
        initializer_range: standard deviation of every projection's initial weights. The projections that write to
            the residual stream (``o_proj``, ``down_proj``) get it divided by sqrt(2 * num_hidden_layers), so that the
            stream's variance does not grow with depth.
        embedding_initializer_range: the same for the token embedding. At 0.02 the first layers of a small model add
            much more to the stream than the token itself holds, and whatever makes the stream grow then lowers the
            loss, thinking or not; 0.5 gave a plain model of width 128 a loss lower by 0.19 nats, and 2.0, at the
            learning rate that suited it best, by another 0.022 (research/results/controls.md).
        router_initializer_range: the same for the routers. Small, so that training starts with weights near
            sigmoid(0) = 0.5 for every token, and with a choice of tokens that the first gradients can still turn.
        step_encoding_init: initial value of phi[t], t >= 1. The paper does not state it. At one every step acts in
            full from the first batch on; at 0.1 the model starts nearly as the plain one and grows its steps. At width
            128 the latter ended 0.037 nats [0.024, 0.049] lower over three seeds, and below the plain model, where the
            former ended above it (research/results/readings.md).
        residual_scale_init: initial value of phi[0], which multiplies the residual stream after the base pass. None:
            one, and two for ``thinking: residual_scale``. With two an ITT is what that control is, but for its steps.
        router_temperature: divides a token's score before ``weight_norm``.
        loss_chunk_tokens: where no logits are asked for, the loss is computed over so many tokens at a time, without
            the logits of all of them; 0 for all at once.
        attention_backend: what computes the chosen tokens' attention over all keys: ``triton`` (CUDA, head sizes 32,
            48, 64 and 128), ``flex``, ``sdpa``, or ``auto``, the first where it runs and else the last. A choice of
            speed; the mathematics is the same.
        **options: the thinking options, and what any ``PretrainedConfig`` takes.

    Raises:
        ValueError: for heads that do not divide the width, or a thinking option that :class:`ThinkingOptions` rejects.
    """

    model_type = 'itt'

    calibrated_thresholds: dict[str, list[list[float]]] | None = None
    """Thresholds for other ratios than the trained ones, per thinking layer and step, by ``0.7/0.7/0.9``."""

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 2560,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        embedding_initializer_range: float = 0.02,
        router_initializer_range: float = 0.002,
        step_encoding_init: float = 0.1,
        residual_scale_init: float | None = None,
        router_temperature: float = 1.0,
        loss_chunk_tokens: int = 2048,
        attention_backend: str = 'auto',
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **options: Any,
    ):
        options = current_names(options)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.embedding_initializer_range = embedding_initializer_range
        self.router_initializer_range = router_initializer_range
        self.step_encoding_init = step_encoding_init
        self.residual_scale_init = options.pop('residual_scale_init', residual_scale_init)
        self.router_temperature = router_temperature
        self.loss_chunk_tokens = loss_chunk_tokens
        self.attention_backend = attention_backend
        self._set_thinking(
            ThinkingOptions(
                num_hidden_layers, **{key: options.pop(key) for key in ThinkingOptions.keys() if key in options}
            )
        )
        self.check()
        super().__init__(
            bos_token_id=bos_token_id, eos_token_id=eos_token_id, tie_word_embeddings=tie_word_embeddings, **options
        )

    def check(self) -> None:
        """Check the values together; some may have been set after the construction, as ``from_pretrained`` does.

        Raises:
            ValueError: one line that names the key.
        """
        check_numbers({key: getattr(self, key) for key in NUMBERS})
        self._set_thinking(self.thinking_options)  # Ratios may have come as text.
        check_heads(self.hidden_size, self.num_attention_heads, self.num_key_value_heads)
        check_attention_backend(self.attention_backend, self.head_dim)
        check_residual_scale(self.residual_scale_init, self.thinking, self.step_encoding)

    def _set_thinking(self, options: ThinkingOptions) -> None:
        for key in ThinkingOptions.keys():
            setattr(self, key, getattr(options, key))

    @property
    def thinking_options(self) -> ThinkingOptions:
        """The thinking options alone, checked."""
        options = {key: getattr(self, key) for key in ThinkingOptions.keys()}
        return ThinkingOptions(self.num_hidden_layers, **current_names(options))

    @property
    def first_encoding_init(self) -> float:
        """Initial value of phi[0]."""
        if self.residual_scale_init is not None:
            return self.residual_scale_init
        return 2.0 if self.thinking == 'residual_scale' else 1.0

    @property
    def head_dim(self) -> int:
        """E, the size of one attention head."""
        return self.hidden_size // self.num_attention_heads

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
        check_keys(options, cls.keys(), where)
        return cls(**options)

    @classmethod
    def keys(cls) -> list[str]:
        """The names of the model's own options, the thinking ones last."""
        own = [name for name in inspect.signature(cls.__init__).parameters if name not in ('self', 'options')]
        return [*own, *ThinkingOptions.keys()]
