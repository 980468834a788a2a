"""The active dtype of autocast."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Autocast's dtype where it is on; None where it is off, as it is in an export and on devices such as ``meta``."""
    if torch.compiler.is_exporting():
        return None
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
