"""The options that turn a LLaMA decoder into an Inner Thinking Transformer, their defaults and their checks.

Standard library only: the model's config, the FLOPs accountant and the run-file resolver all read the options here,
so that a default or a check exists once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from itt_composer.checks import check_choice, is_list_of

THINKING = ('none', 'loop', 'itt', 'residual_scale')
COMBINE = ('weighted', 'equation7', 'algorithm1', 'delta')
THINKING_KV = ('refresh', 'shared', 'routed_only')
SELECTION = ('top_k', 'top_p', 'threshold')
WEIGHT_NORM = ('sigmoid', 'tanh')
REWEIGHTING = ('routed_only', 'symmetric')
ATTENTION_BACKENDS = ('auto', 'triton', 'flex', 'sdpa')
# The head sizes that the Triton kernels of routed attention are made and tested for.
KERNEL_HEAD_SIZES = (32, 48, 64, 128)

# The model's numbers: those that count something, those above zero, those that may be zero, and the others.
COUNTS = (
    *('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads'),
    *('num_key_value_heads', 'max_position_embeddings'),
)
POSITIVE = ('rms_norm_eps', 'rope_theta', 'router_temperature')
NOT_NEGATIVE = ('initializer_range', 'embedding_initializer_range', 'router_initializer_range', 'loss_chunk_tokens')
NUMBERS = (*COUNTS, *POSITIVE, *NOT_NEGATIVE, 'step_encoding_init', 'residual_scale_init')

# Share of tokens per extra step for ITT x2, x3 and x4, from the FLOPs column of Table 1.
PAPER_TOKEN_RATIOS = {1: [0.9], 2: [0.7, 0.7], 3: [0.5, 0.5, 0.5]}


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raise a ValueError for the first of a model's numbers that is none, or not what it may be.

    Args:
        values: any keys of the model; others than ``NUMBERS`` are passed over.
    """
    for key in (key for key in NUMBERS if key in values):
        value = values[key]
        if value is None and key in ('num_key_value_heads', 'residual_scale_init'):
            continue
        if key in COUNTS:
            if not (is_list_of([value], Integral) and value > 0):
                raise ValueError(f'{key}: {value!r} is not a positive whole number')
        elif not (is_list_of([value], Real) and math.isfinite(value)):
            raise ValueError(f'{key}: {value!r} is not a number')
        elif (key in POSITIVE and value <= 0) or (key in NOT_NEGATIVE and value < 0):
            raise ValueError(f'{key}: {value} is {"not above 0" if key in POSITIVE else "below 0"}')


def check_attention_backend(backend: str, head_size: int) -> None:
    """Raise a ValueError for an unknown ``attention_backend``, or for heads that ``triton`` has no kernels for."""
    check_choice('attention_backend', backend, ATTENTION_BACKENDS)
    if backend == 'triton' and head_size not in KERNEL_HEAD_SIZES:
        sizes = ', '.join(map(str, KERNEL_HEAD_SIZES))
        raise ValueError(
            f'attention_backend: triton has kernels for head sizes {sizes}, and these heads have {head_size}; set '
            'attention_backend: auto'
        )


def check_heads(hidden_size: int, num_attention_heads: int, num_key_value_heads: int | None) -> None:
    """Raise a ValueError for heads that do not divide the width evenly, or key-value heads that do not divide those."""
    if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 2:
        raise ValueError(
            f'num_attention_heads: {num_attention_heads} heads do not split hidden_size {hidden_size} into heads of an '
            'even size'
        )
    if num_key_value_heads and num_attention_heads % num_key_value_heads:
        raise ValueError(
            f'num_key_value_heads: {num_key_value_heads} does not divide num_attention_heads {num_attention_heads}'
        )


def check_residual_scale(residual_scale_init: float | None, thinking: str, step_encoding: bool) -> None:
    """Raise a ValueError for a ``residual_scale_init`` of a model that has no phi[0]."""
    if residual_scale_init is None or thinking == 'residual_scale' or (thinking == 'itt' and step_encoding):
        return
    without = 'step_encoding: false' if thinking == 'itt' else f'thinking: {thinking}'
    raise ValueError(f'residual_scale_init: a model with {without} has no phi to start there; leave it out')


def ratios_key(token_ratios: Iterable[float]) -> str:
    """``0.7/0.7/0.9``, the form in which ratios are written on a command line and in ``calibrated_thresholds``."""
    return '/'.join(f'{ratio:g}' for ratio in token_ratios)


def parse_ratios(text: str) -> list[float]:
    """The inverse of :func:`ratios_key`.

    Raises:
        ValueError: for anything else than numbers between slashes.
    """
    try:
        return [float(part) for part in text.split('/')]
    except ValueError:
        raise ValueError(f'token_ratios: {text!r} is not numbers between slashes, such as 0.7/0.7/0.9') from None


def as_ratios(key: str, value: Any) -> list[float]:
    """A list of numbers, or text such as ``0.7/0.7/0.9``, as a list of floats.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str):
        return parse_ratios(value)
    if not is_list_of(value, Real):
        raise ValueError(f'{key}: {value!r} is not a list of numbers; give one for each extra step')
    return [float(ratio) for ratio in value]


def token_count(capacity: float, S: int, token_multiple: int = 1) -> int:
    """k = max(1, floor(capacity * S)) of Algorithm 1, rounded up to ``token_multiple`` and at most S."""
    # 0.7 * 90 is 62.99... in floating point.
    return round_up(max(1, math.floor(capacity * S + 1e-9)), token_multiple, S)


def round_up(k: int, multiple: int, limit: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``k``, at most ``limit``."""
    return min(limit, -(-k // multiple) * multiple)


@dataclass
class ThinkingOptions:
    """How, where and on which tokens a model thinks (Section 3 of the paper).

    After construction every field is filled in and checked; a bad value raises a ValueError that names the key.
    """

    num_hidden_layers: int
    thinking: str = 'none'
    """``none`` is the plain LLaMA; ``loop`` runs a layer again on every token; ``itt`` on the tokens a router picks;
    ``residual_scale`` is a control that runs it once and multiplies the stream by a learned vector."""
    thinking_layers: list[int] | None = None
    """Layers that think, counted from 0. Default: every other layer from 0 (Section 4.1)."""
    thinking_steps: int | None = None
    """T, the extra steps of a thinking layer; the paper's 'x4' is T = 3. Default: as many as ``token_ratios``, or 3."""
    token_ratios: list[float] | None = None
    """rho_t, the share of tokens that extra step t processes. Default: the paper's for x2, x3 and x4; 1 for a loop."""
    combine: str = 'weighted'
    """How a step's result joins the state: four readings of Eq. 4, 6, 7, Algorithm 1 and A.3."""
    thinking_kv: str = 'refresh'
    """Which keys and values a thinking step sees."""
    residual_thinking: bool = True
    """False: a step's result replaces the state instead of being added to it (Table 3)."""
    step_encoding: bool = True
    """False: no phi (Table 3)."""
    token_routing: bool = True
    """False: no routers; every token takes every step with weight one (Table 3)."""
    selection: str = 'top_k'
    """Rule that picks a step's tokens from their scores in training."""
    evaluation_selection: str = 'threshold'
    """The same in evaluation. ``top_k`` and ``top_p`` look ahead: what they give is no left-to-right likelihood."""
    weight_norm: str = 'sigmoid'
    """Map from a token's score to its weight."""
    reweighting: str = 'routed_only'
    """``symmetric`` also scales the tokens that were not chosen, by 1 - weight (Table 3)."""
    alpha: list[float] | float = 1.0
    """alpha_t, the fixed scale of step t's result; one number serves every step."""
    token_multiple: int = 1
    """k is rounded up to a multiple of this, so that compiled code and kernels see few shapes."""

    alpha_T: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice('thinking', self.thinking, THINKING)
        check_choice('combine', self.combine, COMBINE)
        check_choice('thinking_kv', self.thinking_kv, THINKING_KV)
        check_choice('selection', self.selection, SELECTION)
        check_choice('evaluation_selection', self.evaluation_selection, SELECTION)
        check_choice('weight_norm', self.weight_norm, WEIGHT_NORM)
        check_choice('reweighting', self.reweighting, REWEIGHTING)
        self._check_types()
        if self.token_multiple < 1:
            raise ValueError(f'token_multiple: {self.token_multiple} is not a positive number of tokens')
        self._fill_layers()
        self._fill_ratios()
        alpha_T = self.alpha if isinstance(self.alpha, (list, tuple)) else [self.alpha] * self.steps
        if len(alpha_T) != self.steps:
            raise ValueError(
                f'alpha: {len(alpha_T)} values for {self.steps} extra steps; give one number, or one a step'
            )
        self.alpha_T = [float(a) for a in alpha_T]

    @classmethod
    def keys(cls) -> list[str]:
        """The options' names, without ``num_hidden_layers``, which is the decoder's own."""
        return [f.name for f in fields(cls) if f.init and f.name != 'num_hidden_layers']

    @property
    def steps(self) -> int:
        """T, the number of extra thinking steps; 0 for a plain model."""
        assert self.thinking_steps is not None
        return self.thinking_steps

    def _check_types(self) -> None:
        for key in ('residual_thinking', 'step_encoding', 'token_routing'):
            if not isinstance(value := getattr(self, key), bool):
                raise ValueError(f'{key}: {value!r} is not true or false')
        for key in ('thinking_steps', 'token_multiple'):
            value = getattr(self, key)
            if not (is_list_of([value], Integral) or (key == 'thinking_steps' and value is None)):
                raise ValueError(f'{key}: {value!r} is not a whole number')
        if not (self.thinking_layers is None or is_list_of(self.thinking_layers, Integral)):
            raise ValueError(
                f'thinking_layers: {self.thinking_layers!r} is not a list of layer numbers, such as [0, 2]'
            )
        if self.token_ratios is not None:
            self.token_ratios = as_ratios('token_ratios', self.token_ratios)
        if not (is_list_of([self.alpha], Real) or is_list_of(self.alpha, Real)):
            raise ValueError(f'alpha: {self.alpha!r} is not a number, or a list with one for each extra step')

    def _fill_layers(self) -> None:
        if self.thinking == 'none':
            if self.thinking_layers:
                raise ValueError(
                    f'thinking_layers: {self.thinking_layers} given, but thinking is none; set thinking: itt or loop'
                )
            self.thinking_layers = []
            return
        if self.thinking_layers is None:
            self.thinking_layers = list(range(0, self.num_hidden_layers, 2))
        missing = [i for i in self.thinking_layers if not 0 <= i < self.num_hidden_layers]
        if missing:
            raise ValueError(
                f'thinking_layers: no layer {missing[0]}; the model has layers 0 to {self.num_hidden_layers - 1}'
            )
        if not self.thinking_layers:
            raise ValueError('thinking_layers: empty; for a model that does not think set thinking: none')
        if len(set(self.thinking_layers)) < len(self.thinking_layers):
            raise ValueError(f'thinking_layers: {self.thinking_layers} names a layer twice')
        self.thinking_layers = sorted(self.thinking_layers)

    def _fill_ratios(self) -> None:
        if self.thinking in ('none', 'residual_scale'):
            if self.token_ratios or self.thinking_steps:
                why = {
                    'none': 'thinking is none; set thinking: itt or loop',
                    'residual_scale': 'thinking: residual_scale has no steps; remove them',
                }
                raise ValueError(f'token_ratios, thinking_steps: given, but {why[self.thinking]}')
            self.thinking_steps, self.token_ratios = 0, []
            return
        if self.thinking_steps is None:
            self.thinking_steps = len(self.token_ratios) if self.token_ratios else 3
        if self.thinking_steps < 1:
            raise ValueError(f'thinking_steps: {self.thinking_steps} is not at least 1')
        if self.token_ratios is None:
            if self.thinking == 'loop' or not self.token_routing:
                self.token_ratios = [1.0] * self.thinking_steps
            elif self.thinking_steps in PAPER_TOKEN_RATIOS:
                self.token_ratios = list(PAPER_TOKEN_RATIOS[self.thinking_steps])
            else:
                raise ValueError(f'token_ratios: the paper has none for {self.thinking_steps} extra steps; give them')
        if len(self.token_ratios) != self.thinking_steps:
            raise ValueError(
                f'token_ratios: {len(self.token_ratios)} ratios for {self.thinking_steps} extra steps; give one a step'
            )
        for t, ratio in enumerate(self.token_ratios, start=1):
            if not 0 < ratio <= 1:
                raise ValueError(f'token_ratios: {ratio} for step {t} is not in (0, 1]')
        if self.thinking == 'loop' and set(self.token_ratios) != {1.0}:
            raise ValueError(f'token_ratios: {self.token_ratios}, but a loop runs every token; set thinking: itt')
