"""Routed attention as a PyTorch operator: one call to autograd, ``torch.compile`` and activation checkpointing.

B batch, S keys, K routed queries, H heads, G key-value heads, E head size. The equations are in ``attention_kernels``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from itt_composer.kernels import attention_kernels
from itt_composer.ops.precision import product_dtype


class Blocks(NamedTuple):
    """Block sizes of a kernel: queries, keys, warps, and loads in flight."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


SMALLEST_BLOCK_E = 16
# Rows of positions that a program of kv_grad_kernel reads at a time.
SCAN = 1024


def blocks(kernel: str, E: int, itemsize: int) -> Blocks:
    """Return the blocks of ``forward``, ``q_grad`` or ``kv_grad``; selected by counts (benchmarks/block_sweep.py)."""
    if itemsize == 4:
        # float32 keeps its 24 bits: no tensor cores (no TF32), and small blocks, because larger ones spill registers.
        return Blocks(32, 32 if E <= 64 else 16, 8, 2)
    return {
        'forward': Blocks(128, 64, 4 if E <= 64 else 8, 2 if E <= 32 else 3),
        'q_grad': Blocks(128, 64, 8, 2),
        'kv_grad': Blocks(64, 128, 4 if E <= 32 else 8, 2) if E <= 64 else Blocks(32, 64, 4, 2),
    }[kernel]


def pad(itemsize: int) -> int:
    """Return the multiple that rows of lse are rounded up to: the largest BLOCK_M."""
    return 32 if itemsize == 4 else 128


def constants(kernel: str, E: int, itemsize: int) -> dict[str, Any]:
    """Return the compile-time constants of a kernel for this head size and element size in bytes."""
    sizes = dict(E=E, BLOCK_E=max(SMALLEST_BLOCK_E, triton.next_power_of_2(E)), PRECISION='ieee')
    if kernel == 'kv_grad':
        sizes['SCAN'] = SCAN
    return {**sizes, **blocks(kernel, E, itemsize)._asdict()}


def routed_attention(q_BKHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, index_BK: Tensor) -> Tensor:
    """Compute attention of the query at position ``index[b, i]`` over the keys up to that position, scaled by E^-0.5.

    Args:
        q_BKHE: queries, [B, K, H, E]; float32, bfloat16 or float16, as the keys and values; any strides.
        k_BSGE: keys, [B, S, G, E]; each of the G heads serves H / G query heads.
        v_BSGE: values, [B, S, G, E].
        index_BK: position of each query among the keys, int64; any order, fastest in ascending order.

    Returns:
        [B, K, H, E].
    """
    q_BKHE, k_BSGE, v_BSGE = (x.to(product_dtype(x)) for x in (q_BKHE, k_BSGE, v_BSGE))
    return _forward(q_BKHE, k_BSGE, v_BSGE, index_BK)[0]


def _sizes(q_BKHE: Tensor, k_BSGE: Tensor, lse: Tensor) -> tuple[int, int, int, int, int, float]:
    """H, H / G, K, the rows of lse, S and the scale, as every kernel takes them."""
    _, K, H, E = q_BKHE.shape
    return H, H // k_BSGE.shape[2], K, lse.shape[2], k_BSGE.shape[1], E**-0.5


def _empty(q_BKHE: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors for o and lse."""
    B, K, H, _ = q_BKHE.shape
    rows = triton.cdiv(K, pad(q_BKHE.itemsize)) * pad(q_BKHE.itemsize)
    o_BKHE = torch.empty_like(q_BKHE, memory_format=torch.contiguous_format)
    return o_BKHE, q_BKHE.new_empty(B, H, rows, dtype=torch.float32)


@torch.library.custom_op('itt_composer::routed_attention', mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The result and lse, [B, H, K rounded up by ``pad``] in float32, infinite beyond K."""
    B, K, H, E = q.shape
    assert index.shape == (B, K), 'the kernels would read outside it'
    o, lse = _empty(q)
    compiled_with = constants('forward', E, q.itemsize)
    with torch.cuda.device_of(q):
        attention_kernels.forward_kernel[lse.shape[2] // compiled_with['BLOCK_M'], B * H](
            q, k, v, index, o, lse, *q.stride(), *k.stride(), *v.stride(), *index.stride(), *o.stride(),
            *_sizes(q, k, lse), **compiled_with,
        )  # fmt: skip
    return o, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(q)


@torch.library.custom_op('itt_composer::routed_attention_backward', mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    (B, _, H, E), S, G = q.shape, k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strides = [*q.stride(), *k.stride(), *v.stride(), *index.stride()]
    with torch.cuda.device_of(q):
        compiled_with = constants('q_grad', E, q.itemsize)
        attention_kernels.q_grad_kernel[lse.shape[2] // compiled_with['BLOCK_M'], B * H](
            q, k, v, index, o, lse, do, delta, dq, *strides, *o.stride(), *do.stride(), *dq.stride(),
            *_sizes(q, k, lse), **compiled_with,
        )  # fmt: skip
        compiled_with = constants('kv_grad', E, q.itemsize)
        attention_kernels.kv_grad_kernel[triton.cdiv(S, compiled_with['BLOCK_N']), B * G](
            q, k, v, index, lse, do, delta, dk, dv, *strides, *do.stride(), *dk.stride(), *dv.stride(),
            *_sizes(q, k, lse), **compiled_with,
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, do: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_backward(do, *ctx.saved_tensors), None


_forward.register_autograd(_grads, setup_context=_save)
