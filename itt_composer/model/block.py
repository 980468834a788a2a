"""f, one LLaMA-2 decoder layer with its own residual connections: the thing that an ITT layer runs again.

B batch, S sequence, K tokens passed in (all S, or the chosen ones), D hidden, H heads, G key-value heads, E head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itt_composer import ops
from itt_composer.model.cache import PassCache
from itt_composer.model.config import ITTConfig
from itt_composer.model.selection import PackedSelection, Selection


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding at each token's position, [B or 1, K, 1, E] each.

    The first half of the sines has its sign turned: a rotation is then ``x * cos + (x with its halves swapped) * sin``.
    """

    cos_BK1E: Tensor
    sin_BK1E: Tensor

    @classmethod
    def at(cls, position_BS: Tensor, config: ITTConfig) -> Rotation:
        """The rotation for tokens at ``position_BS`` ([B or 1, S]), in float32."""
        E = config.head_dim
        exponent = torch.arange(0, E, 2, dtype=torch.int64, device=position_BS.device).float() / E
        frequency = 1.0 / config.rope_theta**exponent
        half_BS1 = (position_BS[..., None].float() * frequency)[:, :, None]
        cos_BS1, sin_BS1 = half_BS1.cos(), half_BS1.sin()
        return cls(torch.cat((cos_BS1, cos_BS1), dim=-1), torch.cat((-sin_BS1, sin_BS1), dim=-1))

    def last(self, count: int) -> Rotation:
        """The rotation of the last ``count`` tokens."""
        return Rotation(*(table[:, -count:] for table in self))

    def of(self, chosen: Selection | PackedSelection) -> Rotation:
        """The rotation of the chosen tokens, which keep their positions."""
        return Rotation(*(chosen.gather_positions(table) for table in self))

    def rotate(self, x_BKHE: Tensor) -> Tensor:
        """Rotate each head's halves against each other, as LLaMA in Hugging Face's weight layout does."""
        swapped_BKHE = x_BKHE.roll(x_BKHE.shape[-1] // 2, dims=-1)
        cos_BK1E, sin_BK1E = self.cos_BK1E.to(x_BKHE.dtype), self.sin_BK1E.to(x_BKHE.dtype)
        return torch.addcmul(x_BKHE * cos_BK1E, swapped_BKHE, sin_BK1E)


class KeyValue(NamedTuple):
    """Keys (rotated) and values of every token of this call, [B, S, G, E] each."""

    k_BSGE: Tensor
    v_BSGE: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 inside."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the shape and dtype of ``x`` are kept."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Projection(nn.Linear):
    """x W^T, without a bias."""

    def __init__(self, inner: int, dim: int):
        super().__init__(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inner] to [..., dim]."""
        return ops.project(x, self.weight)


class ResidualProjection(Projection):
    """A projection that writes to the residual stream; its initial weights are smaller the deeper the model."""


class Attention(nn.Module):
    """Grouped-query causal attention over the tokens passed in, or over the keys and values of earlier passes."""

    def __init__(self, config: ITTConfig):
        super().__init__()
        self.E = config.head_dim
        self.refresh = config.thinking_kv == 'refresh'
        self.backend = config.attention_backend
        D, E = config.hidden_size, config.head_dim
        self.q_proj = Projection(D, config.num_attention_heads * E)
        self.k_proj = Projection(D, config.num_key_value_heads * E)
        self.v_proj = Projection(D, config.num_key_value_heads * E)
        self.o_proj = ResidualProjection(config.num_attention_heads * E, D)

    def forward(
        self,
        x_BKD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        past: KeyValue | None = None,
        chosen: Selection | PackedSelection | None = None,
        kept: PassCache | None = None,
        last: int = 0,
    ) -> tuple[Tensor, KeyValue]:
        """Attend; see :meth:`DecoderBlock.forward` for the arguments."""
        B, K, _ = x_BKD.shape
        q_rotation = rotation.last(last) if last else rotation
        q_BKHE = q_rotation.rotate(self.q_proj(x_BKD[:, -last:]).unflatten(-1, (-1, self.E)))
        if past is not None and not self.refresh:
            new = past
        else:
            new = KeyValue(
                rotation.rotate(self.k_proj(x_BKD).view(B, K, -1, self.E)), self.v_proj(x_BKD).view(B, K, -1, self.E)
            )
            if chosen is not None and past is None:
                new = KeyValue(chosen.spread(new.k_BSGE), chosen.spread(new.v_BSGE))
            elif chosen is not None and past is not None:
                new = KeyValue(chosen.replace(past.k_BSGE, new.k_BSGE), chosen.replace(past.v_BSGE, new.v_BSGE))
        (k_BSGE, v_BSGE), index_BK, spans = new, None, None
        if chosen is not None:
            q_BKHE = chosen.spread(q_BKHE)
            if past is not None or chosen.spans is not None:
                index_BK, spans = chosen.index_BK, chosen.spans
        if kept is not None:
            k_BSGE, v_BSGE, index_BK = kept.extend(k_BSGE, v_BSGE, index_BK, chosen)
            if past is None:
                spans = None  # Of chosen tokens that see one another alone, a sequence may have kept any number.
        if chosen is not None and past is not None:
            k_BSGE, v_BSGE = chosen.rows(k_BSGE), chosen.rows(v_BSGE)
            padding_BS = None if padding_BS is None else chosen.rows(padding_BS)
        out_BKHE = ops.causal_attention(q_BKHE, k_BSGE, v_BSGE, index_BK, padding_BS, self.backend, spans)
        if chosen is not None:
            out_BKHE = chosen.collect(out_BKHE)
        return self.o_proj(out_BKHE.flatten(2)), new


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ITTConfig):
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderBlock(nn.Module):
    """f: a pre-norm decoder layer. Parameter names are those of Hugging Face's ``LlamaDecoderLayer``."""

    is_decoder_layer = False
    """Whether this stands in the decoder's list of layers itself, rather than as the f of one that thinks."""

    def __init__(self, config: ITTConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x_BKD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        past: KeyValue | None = None,
        chosen: Selection | PackedSelection | None = None,
        kept: PassCache | None = None,
        last: int = 0,
    ) -> tuple[Tensor, KeyValue]:
        """One pass over the tokens in ``x_BKD``.

        Args:
            x_BKD: the tokens' states.
            rotation: rotary embedding at the tokens' own positions.
            padding_BS: False where a token of the keys' sequence is padding; None where there is none.
            past: keys and values of this layer's earlier passes, which the tokens see instead of only one another:
                with their own put in their places (``thinking_kv: refresh``), or as they are (``shared``).
            chosen: where in the sequence of ``past`` the tokens stand; None: they are the whole sequence.
            kept: the keys and values of this pass in earlier calls, which the tokens see too; the new ones join them.
            last: only the last so many tokens' new states are wanted; 0 for all.

        Returns:
            The new states, [B, K or last, D], and this call's keys and values after the pass.
        """
        attended_BKD, new = self.self_attn(self.input_layernorm(x_BKD), rotation, padding_BS, past, chosen, kept, last)
        h_BKD = x_BKD[:, -last:] + attended_BKD
        return h_BKD + self.mlp(self.post_attention_layernorm(h_BKD)), new
