"""Triton kernels that write the routed tokens of a sequence, each number once.

B batch, S sequence, K routed tokens, D numbers per token. ``slot[b, s]`` is the number (0 to K - 1) of the
routed token at position s, or -1. A token is routed at most once, so every row has one writer: no atomics, and the same
bits in each run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def put_rows_kernel(old, new, slot, out, K, S, D, HAS_OLD: tl.constexpr, HAS_NEW: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write ``out[s] = new[slot[s]]`` for a routed token s, else ``old[s]``; a missing one counts as zero."""
    row = tl.program_id(0).to(tl.int64)
    col_D = tl.arange(0, BLOCK_D)
    k = tl.load(slot + row)
    x_D = tl.zeros([BLOCK_D], out.dtype.element_ty)
    if k >= 0:
        if HAS_NEW:
            x_D = tl.load(new + (row // S * K + k) * D + col_D, mask=col_D < D)
    else:
        if HAS_OLD:
            x_D = tl.load(old + row * D + col_D, mask=col_D < D)
    tl.store(out + row * D + col_D, x_D, mask=col_D < D)


@triton.jit
def add_weighted_kernel(
    y, z, weight, phi, slot, out, alpha, K, S, D, HAS_PHI: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Write ``out[s] = y[s] + alpha * weight[k] * z[k] * phi`` if s is the k-th routed token, else ``y[s]``."""
    row = tl.program_id(0).to(tl.int64)
    col_D = tl.arange(0, BLOCK_D)
    k = tl.load(slot + row)
    y_D = tl.load(y + row * D + col_D, mask=col_D < D)
    if k >= 0:
        routed = row // S * K + k
        update_D = alpha * tl.load(weight + routed).to(tl.float32)
        update_D = update_D * tl.load(z + routed * D + col_D, mask=col_D < D).to(tl.float32)
        if HAS_PHI:
            update_D = update_D * tl.load(phi + col_D, mask=col_D < D).to(tl.float32)
        y_D = (y_D.to(tl.float32) + update_D).to(out.dtype.element_ty)
    tl.store(out + row * D + col_D, y_D, mask=col_D < D)


@triton.jit
def add_weighted_grad_kernel(
    dout, z, weight, phi, index, dz, dweight, dphi, alpha, BK, K, S, D,
    HAS_PHI: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With g the gradient of a routed token's result: ``z' = alpha * w * phi * g``, ``w' = alpha * sum_D phi * z * g``.

    ``phi'`` is the sum over all routed tokens of ``alpha * w * z * g``; here over the ROWS of this program, one row of
    ``dphi``.
    """
    program = tl.program_id(0).to(tl.int64)
    col_D = tl.arange(0, BLOCK_D)
    inside_D = col_D < D
    dphi_D = tl.zeros([BLOCK_D], tl.float32)
    phi_D = tl.full([BLOCK_D], 1.0, tl.float32)
    if HAS_PHI:
        phi_D = tl.load(phi + col_D, mask=inside_D, other=0.0).to(tl.float32)
    for routed in range(program * ROWS, tl.minimum((program + 1) * ROWS, BK)):
        row = routed // K * S + tl.load(index + routed)
        w = alpha * tl.load(weight + routed).to(tl.float32)
        g_D = tl.load(dout + row * D + col_D, mask=inside_D, other=0.0).to(tl.float32)
        z_D = tl.load(z + routed * D + col_D, mask=inside_D, other=0.0).to(tl.float32)
        tl.store(dz + routed * D + col_D, (w * phi_D * g_D).to(dz.dtype.element_ty), mask=inside_D)
        tl.store(dweight + routed, alpha * tl.sum(phi_D * z_D * g_D, 0))
        dphi_D += w * z_D * g_D
    if HAS_PHI:
        tl.store(dphi + program * D + col_D, dphi_D, mask=inside_D)
