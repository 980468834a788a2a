"""Triton kernels of routed attention: routed queries attend to every key up to their own position.

B batch, S keys, K routed queries, H heads, G key-value heads, E head size; M and N the rows of one block of queries and
of keys. With c = scale * log2(e), and s running over the keys with s <= pos[i]::

    score[i, s] = c * q[i] . k[s]
    lse[i]      = log2 sum_s 2^score[i, s]
    p[i, s]     = 2^(score[i, s] - lse[i])
    o[i]        = sum_s p[i, s] v[s]

and backward, where a prime marks the gradient::

    delta[i]  = o'[i] . o[i]
    ds[i, s]  = p[i, s] * (o'[i] . v[s] - delta[i])
    q'[i] = scale * sum_s ds[i, s] k[s]    k'[s] = scale * sum_i ds[i, s] q[i]    v'[s] = sum_i p[i, s] o'[i]

The online softmax and the recomputed p are FlashAttention-2's (arXiv 2307.08691); blocks of keys that no query of a
block may attend to are skipped by position, as in arXiv 2306.01160.
A block of queries at positions 5 to 9, keys in blocks of 4::

    keys 0-3    every query attends to all of them: no mask
    keys 4-7    some queries attend to some of them: masked
    keys 8-11   masked
    keys 12-    never read

lse and delta have PADDED_K rows per head, a multiple of each BLOCK_M, so that blocks are read without a mask. A row
beyond K repeats the last query; its lse is infinite, so its p is 0.

The positions may be in any order; the masked part is small if they ascend. Every number is summed in float32 by one
program, so the results are the same in each run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itt_composer.ops import device

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(device.INTERPRETED)


@triton.jit
def _load_rows(ptr, row_R, stride_row, stride_e, rows, BOUNDED: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows of a [rows, E] matrix as a [R, BLOCK_E] block; the last row is repeated, and columns beyond E are zero."""
    col_E = tl.arange(0, BLOCK_E)
    if BOUNDED:
        row_R = tl.minimum(row_R, rows - 1)
    ptrs = ptr + row_R[:, None] * stride_row + col_E[None, :] * stride_e
    if BLOCK_E > E:
        return tl.load(ptrs, mask=col_E[None, :] < E, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store_rows(ptr, x_RE, row_R, stride_row, stride_e, rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    col_E = tl.arange(0, BLOCK_E)
    ptrs = ptr + row_R[:, None] * stride_row + col_E[None, :] * stride_e
    tl.store(ptrs, x_RE.to(ptr.dtype.element_ty), mask=(row_R[:, None] < rows) & (col_E[None, :] < E))


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # The interpreter's dot reads the bits of a bfloat16 as an integer.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if acc is None:
        return tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _my_queries(index, i_b, i_k, H, K, BLOCK_M: tl.constexpr):
    """Return this program's queries: sequence, head, row numbers and positions."""
    # The last queries have the most keys. They start first, so that no long program runs alone at the end.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row_M = m0 + tl.arange(0, BLOCK_M)
    # The repeated query leaves the bounds of the keys as they are.
    pos_M = tl.load(index + b * i_b + tl.minimum(row_M, K - 1) * i_k).to(tl.int32)
    return b, h, row_M, pos_M


@triton.jit
def _attend(
    o_ME, max_M, sum_M, q_ME, pos_M, k, v, k_s, k_e, v_s, v_e, start, end, S, c,
    MASKED: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys from ``start`` to ``end`` to the online softmax."""
    for n0 in range(start, end, BLOCK_N):
        key_N = n0 + tl.arange(0, BLOCK_N)
        k_NE = _load_rows(k, key_N, k_s, k_e, S, MASKED, E, BLOCK_E)
        qk_MN = _dot(q_ME, tl.trans(k_NE), None, PRECISION)
        if MASKED:
            qk_MN = tl.where(key_N[None, :] <= pos_M[:, None], qk_MN, float('-inf'))
        new_max_M = tl.maximum(max_M, tl.max(qk_MN, 1) * c)
        p_MN = tl.exp2(qk_MN * c - new_max_M[:, None])
        shrink_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
        v_NE = _load_rows(v, key_N, v_s, v_e, S, MASKED, E, BLOCK_E)
        o_ME = _dot(p_MN.to(v_NE.dtype), v_NE, o_ME * shrink_M[:, None], PRECISION)
        max_M = new_max_M
    return o_ME, max_M, sum_M


@triton.jit
def forward_kernel(
    q, k, v, index, o, lse,
    q_b, q_k, q_h, q_e, k_b, k_s, k_g, k_e, v_b, v_s, v_g, v_e, i_b, i_k, o_b, o_k, o_h, o_e,
    H, GROUP, K, PADDED_K, S, scale,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute o and lse of one block of queries of one head. ``x_b, x_k, ...`` are strides of x; GROUP is H / G."""
    b, h, row_M, pos_M = _my_queries(index, i_b, i_k, H, K, BLOCK_M)
    c = scale * LOG2_E
    q_ME = _load_rows(q + b * q_b + h * q_h, row_M, q_k, q_e, K, True, E, BLOCK_E)
    k += b * k_b + (h // GROUP) * k_g
    v += b * v_b + (h // GROUP) * v_g

    o_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    max_M = tl.full([BLOCK_M], float('-inf'), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    unmasked = (tl.min(pos_M, 0) + 1) // BLOCK_N * BLOCK_N
    o_ME, max_M, sum_M = _attend(
        o_ME, max_M, sum_M, q_ME, pos_M, k, v, k_s, k_e, v_s, v_e, 0, unmasked, S, c,
        False, E, BLOCK_E, BLOCK_N, PRECISION,
    )  # fmt: skip
    o_ME, max_M, sum_M = _attend(
        o_ME, max_M, sum_M, q_ME, pos_M, k, v, k_s, k_e, v_s, v_e, unmasked, tl.max(pos_M, 0) + 1, S, c,
        True, E, BLOCK_E, BLOCK_N, PRECISION,
    )  # fmt: skip
    _store_rows(o + b * o_b + h * o_h, o_ME / sum_M[:, None], row_M, o_k, o_e, K, E, BLOCK_E)
    lse_M = tl.where(row_M < K, max_M + tl.log2(sum_M), float('inf'))
    tl.store(lse + (b * H + h) * PADDED_K + row_M, lse_M)


@triton.jit
def _add_q_grad(
    dq_ME, q_ME, do_ME, lse_M, delta_M, pos_M, k, v, k_s, k_e, v_s, v_e, start, end, S, c,
    MASKED: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for n0 in range(start, end, BLOCK_N):
        key_N = n0 + tl.arange(0, BLOCK_N)
        k_NE = _load_rows(k, key_N, k_s, k_e, S, MASKED, E, BLOCK_E)
        v_NE = _load_rows(v, key_N, v_s, v_e, S, MASKED, E, BLOCK_E)
        p_MN = tl.exp2(_dot(q_ME, tl.trans(k_NE), None, PRECISION) * c - lse_M[:, None])
        if MASKED:
            p_MN = tl.where(key_N[None, :] <= pos_M[:, None], p_MN, 0.0)
        ds_MN = p_MN * (_dot(do_ME, tl.trans(v_NE), None, PRECISION) - delta_M[:, None])
        dq_ME = _dot(ds_MN.to(k_NE.dtype), k_NE, dq_ME, PRECISION)
    return dq_ME


@triton.jit
def q_grad_kernel(
    q, k, v, index, o, lse, do, delta, dq,
    q_b, q_k, q_h, q_e, k_b, k_s, k_g, k_e, v_b, v_s, v_g, v_e, i_b, i_k, o_b, o_k, o_h, o_e,
    do_b, do_k, do_h, do_e, dq_b, dq_k, dq_h, dq_e,
    H, GROUP, K, PADDED_K, S, scale,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute q' of one block of queries of one head, and delta, which ``kv_grad_kernel`` reads afterwards."""
    b, h, row_M, pos_M = _my_queries(index, i_b, i_k, H, K, BLOCK_M)
    c = scale * LOG2_E
    q_ME = _load_rows(q + b * q_b + h * q_h, row_M, q_k, q_e, K, True, E, BLOCK_E)
    do_ME = _load_rows(do + b * do_b + h * do_h, row_M, do_k, do_e, K, True, E, BLOCK_E)
    o_ME = _load_rows(o + b * o_b + h * o_h, row_M, o_k, o_e, K, True, E, BLOCK_E)
    row0 = (b * H + h) * PADDED_K
    lse_M = tl.load(lse + row0 + row_M)
    delta_M = tl.sum(do_ME.to(tl.float32) * o_ME.to(tl.float32), 1)
    tl.store(delta + row0 + row_M, delta_M)
    k += b * k_b + (h // GROUP) * k_g
    v += b * v_b + (h // GROUP) * v_g

    dq_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    unmasked = (tl.min(pos_M, 0) + 1) // BLOCK_N * BLOCK_N
    dq_ME = _add_q_grad(
        dq_ME, q_ME, do_ME, lse_M, delta_M, pos_M, k, v, k_s, k_e, v_s, v_e, 0, unmasked, S, c,
        False, E, BLOCK_E, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_ME = _add_q_grad(
        dq_ME, q_ME, do_ME, lse_M, delta_M, pos_M, k, v, k_s, k_e, v_s, v_e, unmasked, tl.max(pos_M, 0) + 1, S, c,
        True, E, BLOCK_E, BLOCK_N, PRECISION,
    )  # fmt: skip
    _store_rows(dq + b * dq_b + h * dq_h, dq_ME * scale, row_M, dq_k, dq_e, K, E, BLOCK_E)


@triton.jit
def _add_kv_grad(
    dk_NE, dv_NE, k_NE, v_NE, key_N, q, do, lse, delta, index, q_k, q_e, do_k, do_e, i_k, start, end, K, c,
    MASKED: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients from the queries in rows ``start`` to ``end`` to one block of keys."""
    for m0 in range(start, end, BLOCK_M):
        row_M = m0 + tl.arange(0, BLOCK_M)
        q_ME = _load_rows(q, row_M, q_k, q_e, K, True, E, BLOCK_E)
        do_ME = _load_rows(do, row_M, do_k, do_e, K, True, E, BLOCK_E)
        lse_M = tl.load(lse + row_M)
        delta_M = tl.load(delta + row_M)
        p_NM = tl.exp2(_dot(k_NE, tl.trans(q_ME), None, PRECISION) * c - lse_M[None, :])
        if MASKED:
            pos_M = tl.load(index + tl.minimum(row_M, K - 1) * i_k).to(tl.int32)
            p_NM = tl.where(key_N[:, None] <= pos_M[None, :], p_NM, 0.0)
        dv_NE = _dot(p_NM.to(do_ME.dtype), do_ME, dv_NE, PRECISION)
        ds_NM = p_NM * (_dot(v_NE, tl.trans(do_ME), None, PRECISION) - delta_M[None, :])
        dk_NE = _dot(ds_NM.to(q_ME.dtype), q_ME, dk_NE, PRECISION)
    return dk_NE, dv_NE


@triton.jit
def kv_grad_kernel(
    q, k, v, index, lse, do, delta, dk, dv,
    q_b, q_k, q_h, q_e, k_b, k_s, k_g, k_e, v_b, v_s, v_g, v_e, i_b, i_k, do_b, do_k, do_h, do_e,
    dk_b, dk_s, dk_g, dk_e, dv_b, dv_s, dv_g, dv_e,
    H, GROUP, K, PADDED_K, S, scale,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """Compute k' and v' of one block of keys of one key-value head, from all its query heads."""
    n0 = tl.program_id(0) * BLOCK_N
    G, c = H // GROUP, scale * LOG2_E
    b, g = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    key_N = n0 + tl.arange(0, BLOCK_N)
    k_NE = _load_rows(k + b * k_b + g * k_g, key_N, k_s, k_e, S, True, E, BLOCK_E)
    v_NE = _load_rows(v + b * v_b + g * v_g, key_N, v_s, v_e, S, True, E, BLOCK_E)
    index += b * i_b

    # The first query that attends to a key of this block, and the row after the last query that does not attend to all.
    # (A binary search over ascending positions would be a chain of dependent loads.)
    first_R = tl.full([SCAN], K, tl.int32)
    unmasked_R = tl.zeros([SCAN], tl.int32)
    for r0 in range(0, K, SCAN):
        row_R = r0 + tl.arange(0, SCAN)
        pos_R = tl.load(index + tl.minimum(row_R, K - 1) * i_k).to(tl.int32)
        first_R = tl.minimum(first_R, tl.where(pos_R >= n0, row_R, K))
        unmasked_R = tl.maximum(unmasked_R, tl.where(pos_R < n0 + BLOCK_N - 1, row_R + 1, 0))
    first = tl.min(first_R, 0) // BLOCK_M * BLOCK_M
    unmasked = first + tl.cdiv(tl.maximum(tl.max(unmasked_R, 0) - first, 0), BLOCK_M) * BLOCK_M

    dk_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for h in range(g * GROUP, (g + 1) * GROUP):
        q_h0, do_h0, row0 = q + b * q_b + h * q_h, do + b * do_b + h * do_h, (b * H + h) * PADDED_K
        dk_NE, dv_NE = _add_kv_grad(
            dk_NE, dv_NE, k_NE, v_NE, key_N, q_h0, do_h0, lse + row0, delta + row0, index, q_k, q_e, do_k, do_e, i_k,
            first, tl.minimum(unmasked, K), K, c, True, E, BLOCK_E, BLOCK_M, PRECISION,
        )  # fmt: skip
        dk_NE, dv_NE = _add_kv_grad(
            dk_NE, dv_NE, k_NE, v_NE, key_N, q_h0, do_h0, lse + row0, delta + row0, index, q_k, q_e, do_k, do_e, i_k,
            unmasked, K, K, c, False, E, BLOCK_E, BLOCK_M, PRECISION,
        )  # fmt: skip
    _store_rows(dk + b * dk_b + g * dk_g, dk_NE * scale, key_N, dk_s, dk_e, S, E, BLOCK_E)
    _store_rows(dv + b * dv_b + g * dv_g, dv_NE, key_N, dv_s, dv_e, S, E, BLOCK_E)
