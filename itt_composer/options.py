"""The options of a model: shape of the decoder and its extra steps. Their types, limits, defaults and words.

The only list of them. ``ITTConfig``, the FLOPs accountant, the check of training configs and the table in
``docs/model.md`` are derived from :class:`ModelOptions`, so that a new option is one field here and its use. Standard
library only.
"""

# ruff: noqa: RUF009 (`option` makes a dataclass field, no default that instances would share)

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from itt_composer.checks import check_value
from itt_composer.layer_blocks import as_blocks, checked_layers
from itt_composer.ratios import parse_ratios
from itt_composer.rope_scaling import checked_rope_scaling

SELECTION = ('top_k', 'top_p', 'threshold')
ATTENTION_BACKENDS = ('auto', 'triton', 'sdpa')
# The head sizes that the Triton kernels of routed attention are made and tested for.
KERNEL_HEAD_SIZES = (32, 48, 64, 128)

# Fraction of tokens per extra step for ITT x2, x3 and x4, from the FLOPs column of Table 1.
PAPER_TOKEN_RATIOS = {1: [0.9], 2: [0.7, 0.7], 3: [0.5, 0.5, 0.5]}


def option(default: Any, doc: str, **limits: Any) -> Any:
    """A field of :class:`ModelOptions`.

    Args:
        default: its value where none is set.
        doc: one line for the table of options.
        **limits: ``choices``, or ``minimum``, ``above`` and ``maximum`` as for :func:`check_value`.
    """
    return field(default=default, metadata={'doc': doc, **limits})


@dataclass
class ModelOptions:
    """A decoder (field names as in ``LlamaConfig``), and how, where and on which tokens extra steps run.

    The defaults are the 162M model of Table 5 without thinking. After construction every field is filled in and
    checked; a bad value raises a ValueError of one line that starts with the key.
    """

    vocab_size: int = option(32000, 'number of tokens in the vocabulary', minimum=1, maximum=2**31)
    hidden_size: int = option(1024, 'D', minimum=1, maximum=2**20)
    intermediate_size: int = option(2560, 'width of the MLP', minimum=1, maximum=2**22)
    num_hidden_layers: int = option(8, 'L; layers are counted from 0', minimum=1, maximum=2**14)
    num_attention_heads: int = option(32, 'number of query heads', minimum=1)
    num_key_value_heads: int | None = option(None, 'grouped-query attention; null: `num_attention_heads`', minimum=1)
    head_dim: int | None = option(
        None,
        'E; a multiple of 2 for rotary positions; null: `hidden_size` / `num_attention_heads`',
        minimum=1,
        maximum=2**16,
    )
    max_position_embeddings: int = option(4096, 'longest sequence', minimum=1, maximum=2**31)
    norm: str = option('rmsnorm', '`layernorm` has a bias', choices=('rmsnorm', 'layernorm'))
    rms_norm_eps: float = option(1e-5, 'epsilon of the norms', above=0, maximum=1)
    mlp: str = option('swiglu', '`gelu`: two matrices with biases, GELU in its tanh form', choices=('swiglu', 'gelu'))
    qkv_bias: bool = option(False, 'biases of `q_proj`, `k_proj` and `v_proj`')
    o_bias: bool = option(False, 'bias of `o_proj`')
    qk_norm: bool = option(False, 'RMSNorm of queries and keys, per head')
    position: str = option('rotary', '`learned`: an embedding per position', choices=('rotary', 'learned'))
    rope_theta: float = option(10000.0, 'base of the rotary embedding', above=0, maximum=1e12)
    rope_scaling: dict[str, Any] | None = option(None, 'as in `LlamaConfig`, with `rope_type` `llama3` or `linear`')
    bos_token_id: int | None = option(1, 'null: none; in training, taken from the tokenizer', minimum=0)
    eos_token_id: int | list[int] | None = option(
        2, 'one or several; null: none; in training, taken from the tokenizer', minimum=0
    )
    tie_word_embeddings: bool = option(False, 'one matrix for the embedding and the head')
    # Divided by sqrt(2 L), the variance of the residual stream does not grow with depth.
    initializer_range: float = option(
        0.02, 'init std of the projections; divided by sqrt(2 L) for `o_proj` and `down_proj`', minimum=0, maximum=100
    )
    # Where it is too small, the first layers add much more to the residual stream than the token itself holds.
    embedding_initializer_range: float = option(
        0.02, 'init std of the embedding; small models need more (0.5 at width 128)', minimum=0, maximum=100
    )
    # Small, so that the first gradients can still change which tokens are routed.
    router_initializer_range: float = option(
        0.002, 'init std of the routers; small: every gate value starts near 0.5', minimum=0, maximum=100
    )
    # The paper does not state it; measured in research/results/interpretations_cpu.
    step_encoding_init: float = option(
        0.1, 'initial phi[t], t >= 1; small: the model starts near the dense baseline', minimum=-100, maximum=100
    )
    residual_scale_init: float | None = option(
        None, 'initial phi[0]; null: 2 for `thinking: residual_scale`, otherwise 1', minimum=-100, maximum=100
    )
    router_temperature: float = option(
        1.0, 'divides the scores before they become gate values', minimum=1e-3, maximum=1e3
    )
    loss_chunk_tokens: int = option(2048, 'tokens per chunk of the loss; 0: no chunks', minimum=0)
    attention_backend: str = option(
        'auto',
        'computes the attention of routed tokens; `auto`: `triton` where it can run, otherwise `sdpa`',
        choices=ATTENTION_BACKENDS,
    )
    thinking: str = option(
        'none',
        'the family; see "Families and sizes"',
        choices=('none', 'loop', 'itt', 'residual_scale'),
    )
    thinking_layers: list[int | list[int]] | None = option(
        None, 'list of thinking layers; an item `[2, 3]` is a block of two; null: 0, 2, 4, ...'
    )
    thinking_steps: int | None = option(
        None, 'T, the number of extra steps; null: the number of `token_ratios`, or 3', maximum=1000
    )
    token_ratios: list[float] | None = option(
        None,
        'rho_t, the fraction of tokens routed to step t, in (0, 1]; null: 0.9, 0.7, 0.5 for x2, x3, x4; 1 for a loop',
    )
    combine: str = option(
        'weighted',
        "how a step's result is added; see below",
        choices=('weighted', 'equation7', 'algorithm1', 'delta'),
    )
    thinking_kv: str = option(
        'refresh',
        'which keys and values a step attends to; see below',
        choices=('refresh', 'shared', 'routed_only'),
    )
    residual_thinking: bool = option(True, "false: a step's result replaces the hidden state (Table 3)")
    step_encoding: bool = option(True, 'false: no phi (Table 3)')
    token_routing: bool = option(True, 'false: no routers, every token takes every step (Table 3)')
    selection: str = option('top_k', 'routing in training; see below', choices=SELECTION)
    evaluation_selection: str = option(
        'threshold', 'routing in evaluation; `top_k` and `top_p` are non-causal', choices=SELECTION
    )
    weight_norm: str = option(
        'sigmoid',
        'the gate function, which maps a score to the gate value; not weight normalization',
        choices=('sigmoid', 'tanh'),
    )
    reweighting: str = option(
        'routed_only',
        '`symmetric` also scales the other tokens, by 1 - gate value (Table 3)',
        choices=('routed_only', 'symmetric'),
    )
    alpha: list[float] | float = option(
        1.0, "alpha_t, a fixed factor of a step's result; one number, or one per step", minimum=-100, maximum=100
    )
    token_multiple: int = option(1, 'rounds k up to a multiple of this; larger: fewer shapes to compile', minimum=1)

    alpha_T: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.token_ratios, str):
            self.token_ratios = parse_ratios(self.token_ratios)
        for f in fields(self):
            if f.init:
                limits = {name: limit for name, limit in f.metadata.items() if name != 'doc'}
                check_value(f.name, getattr(self, f.name), str(f.type), **limits)
        if self.token_multiple > self.max_position_embeddings:
            raise ValueError(
                f'token_multiple: expected at most max_position_embeddings ({self.max_position_embeddings}), '
                f'got {self.token_multiple}'
            )
        self._fill_heads()
        if self.rope_scaling is not None:
            self.rope_scaling = checked_rope_scaling(self.rope_scaling, self.rope_theta)
        if self.rope_scaling is not None and self.position == 'learned':
            raise ValueError('rope_scaling: set, but position is learned; leave it out')
        self._fill_layers()
        self._fill_ratios()
        self._check_residual_scale()
        alpha: Any = self.alpha
        alpha_T = [alpha] * self.steps if isinstance(alpha, Real) else list(alpha)
        if len(alpha_T) != self.steps:
            raise ValueError(
                f'alpha: {len(alpha_T)} values for {self.steps} extra steps; set one number, or one per step'
            )
        self.alpha_T = [float(a) for a in alpha_T]

    @classmethod
    def keys(cls) -> list[str]:
        """The options' names."""
        return [f.name for f in fields(cls) if f.init]

    @property
    def steps(self) -> int:
        """T, the number of extra steps; 0 for the dense baseline."""
        assert self.thinking_steps is not None
        return self.thinking_steps

    @property
    def thinking_blocks(self) -> list[list[int]]:
        """The layers of each block that the extra steps repeat, most often one; none for the dense baseline."""
        return as_blocks(self.thinking_layers or [])

    def _fill_heads(self) -> None:
        heads, D = self.num_attention_heads, self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.head_dim is None:
            if D % heads or (self.position == 'rotary' and (D // heads) % 2):
                raise ValueError(
                    f'num_attention_heads: {heads} heads do not split hidden_size {D} into heads of an even size'
                )
            self.head_dim = D // heads
        if self.position == 'rotary' and self.head_dim % 2:
            raise ValueError(f'head_dim: expected an even number with position: rotary, got {self.head_dim}')
        if heads % self.num_key_value_heads:
            raise ValueError(
                f'num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads {heads}'
            )
        if self.attention_backend == 'triton' and self.head_dim not in KERNEL_HEAD_SIZES:
            sizes = ', '.join(map(str, KERNEL_HEAD_SIZES))
            raise ValueError(
                f'attention_backend: triton has kernels for head sizes {sizes}, and these heads have {self.head_dim}; '
                'set attention_backend: auto'
            )

    def _fill_layers(self) -> None:
        if self.thinking == 'none':
            if self.thinking_layers:
                raise ValueError(
                    f'thinking_layers: {self.thinking_layers} set, but thinking is none; set thinking: itt or loop'
                )
            self.thinking_layers = []
            return
        if self.thinking_layers is None:
            self.thinking_layers = list(range(0, self.num_hidden_layers, 2))
        self.thinking_layers = checked_layers(self.thinking_layers, self.num_hidden_layers)

    def _fill_ratios(self) -> None:
        if self.thinking in ('none', 'residual_scale'):
            if self.token_ratios or self.thinking_steps:
                why = {
                    'none': 'thinking is none; set thinking: itt or loop',
                    'residual_scale': 'thinking: residual_scale has no steps; remove them',
                }
                raise ValueError(f'token_ratios, thinking_steps: set, but {why[self.thinking]}')
            self.thinking_steps, self.token_ratios = 0, []
            return
        if self.thinking_steps is None:
            self.thinking_steps = len(self.token_ratios) if self.token_ratios else 3
        if self.thinking_steps < 1:
            raise ValueError(f'thinking_steps: expected at least 1, got {self.thinking_steps}')
        if self.token_ratios is None:
            if self.thinking == 'loop' or not self.token_routing:
                self.token_ratios = [1.0] * self.thinking_steps
            elif self.thinking_steps in PAPER_TOKEN_RATIOS:
                self.token_ratios = list(PAPER_TOKEN_RATIOS[self.thinking_steps])
            else:
                raise ValueError(f'token_ratios: the paper has none for {self.thinking_steps} extra steps; set them')
        self.token_ratios = [float(ratio) for ratio in self.token_ratios]
        if len(self.token_ratios) != self.thinking_steps:
            raise ValueError(
                f'token_ratios: {len(self.token_ratios)} ratios for {self.thinking_steps} extra steps; set one per step'
            )
        for t, ratio in enumerate(self.token_ratios, start=1):
            if not 0 < ratio <= 1:
                raise ValueError(f'token_ratios: {ratio} for step {t} is not in (0, 1]')
        if self.thinking == 'loop' and set(self.token_ratios) != {1.0}:
            raise ValueError(f'token_ratios: {self.token_ratios}, but a loop runs every token; set thinking: itt')

    def _check_residual_scale(self) -> None:
        has_phi = self.thinking == 'residual_scale' or (self.thinking == 'itt' and self.step_encoding)
        if self.residual_scale_init is not None and not has_phi:
            without = 'step_encoding: false' if self.thinking == 'itt' else f'thinking: {self.thinking}'
            raise ValueError(f'residual_scale_init: a model with {without} has no phi to initialise; leave it out')


def token_count(capacity: float, S: int, token_multiple: int = 1) -> int:
    """k = max(1, floor(capacity * S)) of Algorithm 1, rounded up to ``token_multiple`` and at most S."""
    # 0.7 * 90 is 62.99... in floating point.
    return round_up(max(1, math.floor(capacity * S + 1e-9)), token_multiple, S)


def round_up(k: int, multiple: int, limit: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``k``, at most ``limit``."""
    return min(limit, -(-k // multiple) * multiple)
