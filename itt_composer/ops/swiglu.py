"""silu(gate) * up, the middle of SwiGLU. B batch, K tokens, I intermediate size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_BKI: Tensor, up_BKI: Tensor) -> Tensor:
    """silu(gate) * up, [B, K, I].

    Without gradients the product takes silu's memory: large results that come and go cost more than what is in them.
    And without gradients, for a multiple of eight tokens, no bit hangs on where among them a token stands.
    """
    if gate_BKI.requires_grad or up_BKI.requires_grad:
        return F.silu(gate_BKI) * up_BKI
    # On a CPU each thread's last elements, fewer than four vectors' worth, go through another exp. A multiple of eight
    # tokens leaves none with one or two threads; torch.exp has but one way.
    if gate_BKI.is_cpu and (torch.get_num_threads() > 2 or gate_BKI.shape[-1] % 8):
        silu_BKI = gate_BKI.neg().exp_().add_(1)
        return torch.div(gate_BKI, silu_BKI, out=silu_BKI).mul_(up_BKI)
    return F.silu(gate_BKI).mul_(up_BKI)
