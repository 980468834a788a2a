"""Where the Triton kernels run."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

# Triton itself reads this when it is imported, and then interprets every kernel.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'

# What they compute in float32 inside; copies of tokens may be of any dtype.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(x: Tensor) -> ModuleType | None:
    """:mod:`itt_composer.kernels` where its kernels can take ``x``: on a CUDA device, or interpreted on any.

    Loaded here, so that a machine without CUDA need not have Triton, and a model that was exported need not have this
    package.
    """
    if not (x.is_cuda or INTERPRETED):
        return None
    try:
        from itt_composer import kernels
    except ImportError:
        return None
    return kernels
