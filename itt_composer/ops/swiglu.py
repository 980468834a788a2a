"""silu(gate) * up, the middle of SwiGLU. R sequences, K tokens, I intermediate size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_RKI: Tensor, up_RKI: Tensor) -> Tensor:
    """silu(gate) * up, [R, K, I]; without gradients in silu's memory, as large results cost more than their values."""
    if gate_RKI.requires_grad or up_RKI.requires_grad:
        return F.silu(gate_RKI) * up_RKI
    return F.silu(gate_RKI).mul_(up_RKI)
