"""A control for studies, not in the paper: the residual stream grows as in an ITT layer, without an extra step.

B batch, S sequence, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from itt_composer.model.block import Trace
from itt_composer.model.blocks import BlockKeyValue, thinking_block
from itt_composer.model.cache import PassCache
from itt_composer.model.config import ITTConfig
from itt_composer.model.legacy import rename_loaded_weights
from itt_composer.model.rotary import Rotation


class ResidualScaleLayer(nn.Module):
    """y = block(x) * phi: one pass, then the residual stream times a learned vector, which starts at two.

    With ``combine: weighted`` a step of ITT adds gate * z * phi to a routed token, and z contains y, so that at gate
    0.5 and phi 1 a step multiplies its stream by about 1.5; over the three steps of x4 that is about 2 for the average
    token. A badly scaled dense baseline gains from that growth alone. What this control gains is no evidence for
    thinking.
    """

    def __init__(self, config: ITTConfig, index: int):
        super().__init__()
        self.index = index
        self.block = thinking_block(config, index)
        self.phi_D = nn.Parameter(torch.ones(config.hidden_size))
        self.register_load_state_dict_pre_hook(rename_loaded_weights)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        cache: PassCache | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, BlockKeyValue]:
        """[B, S, D] to [B, S, D], and the pass's keys and values; arguments as in :class:`ITTLayer`."""
        y_BSD, kv = self.block(x_BSD, rotation, padding_BS, cache=cache, trace=trace)
        return (y_BSD * self.phi_D).to(y_BSD.dtype), kv
