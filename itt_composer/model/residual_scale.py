"""A control for studies, not in the paper: the stream grows as in an ITT layer, and no token is thought about twice.

B batch, S sequence, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from itt_composer.model.block import DecoderBlock, KeyValue, Rotation
from itt_composer.model.cache import PassCache
from itt_composer.model.config import ITTConfig


class ResidualScaleLayer(nn.Module):
    """y = f(x) * phi: one pass, then the stream times a learned vector, which starts at two (``residual_scale_init``).

    With ``combine: weighted`` a step of ITT adds weight * z * phi to a chosen token, and z contains y, so that at
    weight 0.5 and phi 1 a step multiplies its stream by about 1.5; over the three steps of x4 that is about 2 for the
    average token. A badly scaled plain model gains from that growth alone. What this control gains is no evidence for
    thinking.
    """

    def __init__(self, config: ITTConfig, index: int):
        super().__init__()
        self.index = index
        self.f = DecoderBlock(config)
        self.phi_D = nn.Parameter(torch.ones(config.hidden_size))

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, padding_BS: Tensor | None = None, kept: PassCache | None = None
    ) -> tuple[Tensor, KeyValue]:
        """[B, S, D] to [B, S, D], and the pass's keys and values; arguments as in :class:`ITTLayer`."""
        y_BSD, kv = self.f(x_BSD, rotation, padding_BS, kept=kept)
        return (y_BSD * self.phi_D).to(y_BSD.dtype), kv
