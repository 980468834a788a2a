"""The active dtype of autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Autocast's dtype where it is on; None where it is off, as on the device ``meta``, which has none."""
    if device_type == 'meta' or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of ``x`` are computed."""
    return autocast_dtype(x.device.type) or x.dtype
