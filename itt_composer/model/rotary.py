"""The rotary embedding, with the frequency scalings of LLaMA 3 and of linear interpolation.

B batch, S sequence, K tokens passed in, H heads, E head size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from itt_composer.model.config import ITTConfig
from itt_composer.model.selection import Selection


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding at each token's position, [B or 1, K, 1, E] each.

    The first half of the sines has its sign turned: a rotation is then ``x * cos + (x with its halves swapped) * sin``.
    A model with learned positions has empty tables, E = 0, and rotates nothing.
    """

    cos_BK1E: Tensor
    sin_BK1E: Tensor

    @classmethod
    def at(cls, position_BS: Tensor, config: ITTConfig) -> Rotation:
        """The rotation for tokens at ``position_BS`` ([B or 1, S]), in float32."""
        if config.position == 'learned':
            empty = position_BS.new_empty((*position_BS.shape, 1, 0), dtype=torch.float32)
            return cls(empty, empty)
        half_BS1 = (position_BS[..., None].float() * _frequencies(config, position_BS.device))[:, :, None]
        cos_BS1, sin_BS1 = half_BS1.cos(), half_BS1.sin()
        return cls(torch.cat((cos_BS1, cos_BS1), dim=-1), torch.cat((-sin_BS1, sin_BS1), dim=-1))

    def to(self, dtype: torch.dtype) -> Rotation:
        """The same in another dtype."""
        return Rotation(*(table.to(dtype) for table in self))

    def last(self, count: int) -> Rotation:
        """The rotation of the last ``count`` tokens; 0: of all."""
        return Rotation(*(table[:, -count:] for table in self)) if count else self

    def of(self, routed: Selection) -> Rotation:
        """The rotation of the routed tokens, which keep their positions."""
        if not self.cos_BK1E.shape[-1]:
            return self
        return Rotation(*(routed.gather_positions(table) for table in self))

    def rotate(self, x_BKHE: Tensor) -> Tensor:
        """Rotate each head's halves against each other, as LLaMA in Hugging Face's weight layout does."""
        if not self.cos_BK1E.shape[-1]:
            return x_BKHE
        swapped_BKHE = x_BKHE.roll(x_BKHE.shape[-1] // 2, dims=-1)
        cos_BK1E, sin_BK1E = self.cos_BK1E.to(x_BKHE.dtype), self.sin_BK1E.to(x_BKHE.dtype)
        return torch.addcmul(x_BKHE * cos_BK1E, swapped_BKHE, sin_BK1E)


def _frequencies(config: ITTConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head, [E / 2]."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling['rope_type'] == 'linear':
        return frequency / scaling['factor']
    # LLaMA 3: pairs that turn often within the original context stay, slow ones are divided by the factor, and those
    # between are interpolated in the number of turns.
    turns = scaling['original_max_position_embeddings'] * frequency / (2 * math.pi)
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (unscaled + (1 - unscaled) / scaling['factor'])
