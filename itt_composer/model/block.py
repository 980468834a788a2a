"""The block: one pre-norm decoder layer with its own residual connections, which an ITT layer runs again.

By default it is LLaMA-2's. Options of the config make it that of other families (:mod:`.pretrained_dense`).

B batch, S sequence, D hidden, H heads, G key-value heads, E head size. R sequences of K tokens are passed in: the whole
batch (R = B, K = S), or the routed tokens of the sequences that have some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from itt_composer import ops
from itt_composer.model.cache import PassCache
from itt_composer.model.config import ITTConfig
from itt_composer.model.rotary import Rotation
from itt_composer.model.selection import Selection, exporting
from itt_composer.ops.precision import product_dtype

# Elements of a tensor from which its memory counts for more than the time of PyTorch's bookkeeping.
RECOMPUTED_ELEMENTS = 2**22


class KeyValue(NamedTuple):
    """Keys (rotated) and values of every token of this call, [B, S, G, E] each."""

    k_BSGE: Tensor
    v_BSGE: Tensor


class Trace:
    """What a caller asks to see of the base passes; a layer appends its own to each list that is not None.

    No dataclass, of which FSDP 1 would hand a copy to the layer.

    Attributes:
        attentions: attention weights of each layer, [B, H, S, P + S] with P tokens in the cache.
        hidden_states: those of :meth:`ITTModel.forward`, [B, S, D] each.
    """

    def __init__(self, attentions: list[Tensor] | None = None, hidden_states: list[Tensor] | None = None):
        self.attentions = attentions
        self.hidden_states = hidden_states


def make_norm(config: ITTConfig) -> nn.Module:
    """The norm of hidden states that the config asks for, [..., D]."""
    kind = nn.RMSNorm if config.norm == 'rmsnorm' else nn.LayerNorm
    return kind(config.hidden_size, config.rms_norm_eps)


class ResidualProjection(nn.Linear):
    """A projection that writes to the residual stream; its initial weights are smaller the deeper the model."""


class Attention(nn.Module):
    """Grouped-query causal attention over the tokens passed in, or over the keys and values of earlier passes."""

    def __init__(self, config: ITTConfig):
        super().__init__()
        self.E = config.head_dim
        self.refresh = config.thinking_kv == 'refresh'
        self.backend = config.attention_backend
        D, E = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * E, config.qkv_bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * E, config.qkv_bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * E, config.qkv_bias)
        self.o_proj = ResidualProjection(config.num_attention_heads * E, D, config.o_bias)
        self.q_norm = nn.RMSNorm(E, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(E, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_RKD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        past_kv: KeyValue | None = None,
        routed: Selection | None = None,
        cache: PassCache | None = None,
        last: int = 0,
        trace: Trace | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Attend; see :meth:`DecoderBlock.forward` for the arguments."""
        q_RKHE = self._heads(ops.last_tokens(x_RKD, last), self.q_proj, self.q_norm, rotation.last(last))
        if past_kv is not None and not self.refresh:
            kv = past_kv
        else:
            kv = KeyValue(
                self._heads(x_RKD, self.k_proj, self.k_norm, rotation),
                self.v_proj(x_RKD).unflatten(-1, (-1, self.E)),
            )
            if past_kv is not None and routed is not None:
                kv = KeyValue(*(routed.replace(past, new) for past, new in zip(past_kv, kv, strict=True)))
        k_BSGE, v_BSGE = kv
        # Routed tokens that see one another alone are a sequence of their own, in order.
        index_RK = routed.index_RK if routed is not None and past_kv is not None else None
        if cache is not None:
            k_BSGE, v_BSGE, index_RK = cache.extend(k_BSGE, v_BSGE, index_RK, routed)
        if routed is not None and past_kv is not None:
            k_BSGE, v_BSGE = routed.sequences(k_BSGE), routed.sequences(v_BSGE)
            padding_BS = None if padding_BS is None else routed.sequences(padding_BS)
        if trace is None or trace.attentions is None:
            out_RKHE = ops.causal_attention(q_RKHE, k_BSGE, v_BSGE, index_RK, padding_BS, self.backend)
        else:
            out_RKHE, weights_RHKS = ops.attention_with_weights(q_RKHE, k_BSGE, v_BSGE, padding_BS)
            trace.attentions.append(weights_RHKS)
        return self.o_proj(out_RKHE.flatten(2)), kv

    def _heads(self, x_RKD: Tensor, projection: nn.Module, norm: nn.Module | None, rotation: Rotation) -> Tensor:
        """Queries or keys of the tokens, normalised and rotated."""
        x_RKHE = projection(x_RKD).unflatten(-1, (-1, self.E))
        return rotation.rotate(x_RKHE if norm is None else norm(x_RKHE))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ITTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return _recomputed(lambda gate, up: self.down_proj(ops.swiglu(gate, up)), self.gate_proj(x), self.up_proj(x))


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with biases and the tanh form of GELU (GPT-2)."""

    def __init__(self, config: ITTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return _recomputed(lambda up: self.down_proj(F.gelu(up, approximate='tanh')), self.up_proj(x))


def _recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, whose intermediate results are computed again in the backward pass instead of kept.

    The last operation is not computed again, because no gradient needs its result. An exported graph has none of this,
    because its sizes are open.
    """
    if torch.is_grad_enabled() and not exporting() and inputs[0].numel() >= RECOMPUTED_ELEMENTS:
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` with one cast for all projections of it: autocast does one for each."""
    return _recomputed(lambda x: norm(x).to(product_dtype(x)), x)


class DecoderBlock(nn.Module):
    """A pre-norm decoder layer. Parameter names are those of Hugging Face's ``LlamaDecoderLayer``."""

    is_decoder_layer = False
    """Whether this stands in the decoder's list of layers itself, rather than as the block of a thinking layer."""
    gradient_checkpointing = False
    """Set by transformers' ``gradient_checkpointing_enable``, with the function."""
    _gradient_checkpointing_func: Callable[..., tuple[Tensor, ...]]

    def __init__(self, config: ITTConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == 'swiglu' else GeluMLP(config)

    def __call__(
        self,
        x_RKD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        past_kv: KeyValue | None = None,
        routed: Selection | None = None,
        cache: PassCache | None = None,
        last: int = 0,
        trace: Trace | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """:meth:`forward`, recomputed in the backward pass where ``gradient_checkpointing`` is on."""
        call = super().__call__
        shown = cache is not None or (trace is not None and trace.attentions is not None)
        if shown or not (self.gradient_checkpointing and self.training):
            return call(x_RKD, rotation, padding_BS, past_kv, routed, cache, last, trace)

        def one_pass(x_RKD: Tensor, *past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            new_RKD, kv = call(x_RKD, rotation, padding_BS, KeyValue(*past) if past else None, routed, None, last)
            return new_RKD, *kv

        # Flat arguments and results: a reentrant checkpoint follows no gradient into a tuple.
        new_RKD, *kv = self._gradient_checkpointing_func(one_pass, x_RKD, *(past_kv or ()))
        return new_RKD, KeyValue(*kv)

    def forward(
        self,
        x_RKD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        past_kv: KeyValue | None = None,
        routed: Selection | None = None,
        cache: PassCache | None = None,
        last: int = 0,
        trace: Trace | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """One pass over the tokens in ``x_RKD``.

        Args:
            x_RKD: the tokens' hidden states.
            rotation: rotary embedding at the tokens' own positions.
            padding_BS: False where a token of the keys' sequence is padding; None: no padding.
            past_kv: keys and values of this layer's earlier passes, which the tokens see instead of only one another:
                with their own in place of their old ones (``thinking_kv: refresh``), or as they are (``shared``).
            routed: which tokens of the sequences are passed in; None: all.
            cache: the keys and values of this pass in earlier calls, which the tokens see too; the new ones are added.
            last: only the new hidden states of the last ``last`` tokens are needed; 0: all.
            trace: its list of attentions, where it has one, gets the weights of this pass, [R, H, K, S].

        Returns:
            The new hidden states, [R, K or last, D], and this call's keys and values after the pass.
        """
        normed_RKD = _normed(self.input_layernorm, x_RKD)
        attended_RKD, kv = self.self_attn(normed_RKD, rotation, padding_BS, past_kv, routed, cache, last, trace)
        h_RKD = ops.last_tokens(x_RKD, last) + attended_RKD
        return h_RKD + self.mlp(_normed(self.post_attention_layernorm, h_RKD)), kv
