"""Projections whose rows do not feel one another. K rows, I inner size, D results of a row.

MKL divides a product by its size: more than 256 inner elements it may sum in parts, and which parts depends on how many
rows and threads there are. Where the number of rows follows from later tokens, so would an earlier token's last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

# So many inner elements are summed in one way for any 16 rows and more, and any number of threads.
INNER_PIECE = 256

# Of each thread: texts may be generated in several.
_wanted = threading.local()


@contextmanager
def any_number_of_rows(wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, :func:`project` gives a row the same bits among any other rows, sixteen or more in all."""
    before, _wanted.here = getattr(_wanted, 'here', False), wanted
    try:
        yield
    finally:
        _wanted.here = before


def project(x_KI: Tensor, weight_DI: Tensor) -> Tensor:
    """x W^T, [..., K, I] to [..., K, D]."""
    # Compiled passes are those of training, which never asks for it.
    if torch.compiler.is_compiling() or not getattr(_wanted, 'here', False) or x_KI.shape[-1] <= INNER_PIECE:
        return F.linear(x_KI, weight_DI)
    # bfloat16 goes another way than MKL's, and its sums would be rounded after each piece.
    by_mkl = x_KI.is_cpu and x_KI.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
    if not by_mkl or torch.get_num_threads() == 1:
        return F.linear(x_KI, weight_DI)
    first, *others = zip(x_KI.split(INNER_PIECE, -1), weight_DI.split(INNER_PIECE, -1), strict=True)
    out_KD = F.linear(*first)
    for x_Ki, weight_Di in others:
        out_KD += F.linear(x_Ki, weight_Di)
    return out_KD
