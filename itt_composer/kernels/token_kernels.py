"""Triton kernels that write the chosen tokens of a sequence, each number once.

B batch, S sequence, K chosen tokens, D numbers a token. ``slot[b, s]`` says which of the K chosen tokens stands at s,
or -1. A token is chosen at most once, so every row has one writer: no atomics, and the same bits in each run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def put_rows_kernel(old, new, slot, out, K, S, D, HAS_OLD: tl.constexpr, HAS_NEW: tl.constexpr, BLOCK_D: tl.constexpr):
    """``out[s] = new[slot[s]]`` where s is chosen, else ``old[s]``; zero for the one that is not given."""
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
    """``out[s] = y[s] + alpha * weight[k] * z[k] * phi`` where s is the k-th chosen token, else ``y[s]``."""
    row = tl.program_id(0).to(tl.int64)
    col_D = tl.arange(0, BLOCK_D)
    k = tl.load(slot + row)
    y_D = tl.load(y + row * D + col_D, mask=col_D < D)
    if k >= 0:
        chosen = row // S * K + k
        update_D = alpha * tl.load(weight + chosen).to(tl.float32)
        update_D = update_D * tl.load(z + chosen * D + col_D, mask=col_D < D).to(tl.float32)
        if HAS_PHI:
            update_D = update_D * tl.load(phi + col_D, mask=col_D < D).to(tl.float32)
        y_D = (y_D.to(tl.float32) + update_D).to(out.dtype.element_ty)
    tl.store(out + row * D + col_D, y_D, mask=col_D < D)


@triton.jit
def add_weighted_grad_kernel(
    dout, z, weight, phi, index, dz, dweight, dphi, alpha, BK, K, S, D,
    HAS_PHI: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With g the gradient of a chosen token's result: ``z' = alpha * w * phi * g``, ``w' = alpha * sum_D phi * z * g``.

    ``phi'`` is the sum over all chosen tokens of ``alpha * w * z * g``; here over the ROWS of this program, one row of
    ``dphi``.
    """
    program = tl.program_id(0).to(tl.int64)
    col_D = tl.arange(0, BLOCK_D)
    inside_D = col_D < D
    dphi_D = tl.zeros([BLOCK_D], tl.float32)
    phi_D = tl.full([BLOCK_D], 1.0, tl.float32)
    if HAS_PHI:
        phi_D = tl.load(phi + col_D, mask=inside_D, other=0.0).to(tl.float32)
    for chosen in range(program * ROWS, tl.minimum((program + 1) * ROWS, BK)):
        row = chosen // K * S + tl.load(index + chosen)
        w = alpha * tl.load(weight + chosen).to(tl.float32)
        g_D = tl.load(dout + row * D + col_D, mask=inside_D, other=0.0).to(tl.float32)
        z_D = tl.load(z + chosen * D + col_D, mask=inside_D, other=0.0).to(tl.float32)
        tl.store(dz + chosen * D + col_D, (w * phi_D * g_D).to(dz.dtype.element_ty), mask=inside_D)
        tl.store(dweight + chosen, alpha * tl.sum(phi_D * z_D * g_D, 0))
        dphi_D += w * z_D * g_D
    if HAS_PHI:
        tl.store(dphi + program * D + col_D, dphi_D, mask=inside_D)
