"""Reading and writing the routed tokens as PyTorch operators; the mathematics is in ``token_kernels``.

B batch, S sequence, K routed tokens; ``...`` any trailing dimensions. Positions are unique within a row of ``index``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from itt_composer.kernels import token_kernels
from itt_composer.ops.tokens import gather_rows

# Routed tokens whose part of phi's gradient one program sums.
ROWS = 16


def replace_tokens(x_BS: Tensor, index_BK: Tensor, new_BK: Tensor) -> Tensor:
    """Return ``x`` with token ``index[b, k]`` replaced by ``new[b, k]``."""
    return _put(x_BS, new_BK, index_BK, x_BS.shape[1])


def _slots(index_BK: Tensor, S: int) -> Tensor:
    """Return the number of the routed token at each position, or -1, [B, S]."""
    B, K = index_BK.shape
    slot_BS = torch.full((B, S), -1, dtype=torch.int32, device=index_BK.device)
    order_K = torch.arange(K, dtype=torch.int32, device=index_BK.device)
    return slot_BS.scatter_(1, index_BK, order_K.expand(B, K))


def block_of(D: int) -> dict[str, int]:
    """Return the block of a program, which holds one complete token."""
    block = triton.next_power_of_2(D)
    return dict(BLOCK_D=block, num_warps=4 if block <= 2048 else 8)


def _width(x_BS: Tensor) -> dict[str, int]:
    D = math.prod(x_BS.shape[2:])
    return dict(D=D, **block_of(D))


@torch.library.custom_op('itt_composer::put_tokens', mutates_args=())
def _put(old: Tensor | None, new: Tensor | None, index: Tensor, S: int) -> Tensor:
    """[B, S, ...]: ``new`` at the routed positions and ``old`` elsewhere; a missing one counts as zero."""
    given = new if old is None else old
    assert given is not None
    B, K = index.shape
    out = given.new_empty(B, S, *given.shape[2:])
    old, new = (None if x is None else x.contiguous() for x in (old, new))
    with torch.cuda.device_of(out):
        token_kernels.put_rows_kernel[B * S,](
            out if old is None else old, out if new is None else new, _slots(index, S), out,
            K=K, S=S, HAS_OLD=old is not None, HAS_NEW=new is not None, **_width(out),
        )  # fmt: skip
    return out


@_put.register_fake
def _(old: Tensor | None, new: Tensor | None, index: Tensor, S: int) -> Tensor:
    given = new if old is None else old
    assert given is not None
    return given.new_empty(index.shape[0], S, *given.shape[2:])


def _save_index(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _put_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    (index,) = ctx.saved_tensors
    old, new = ctx.needs_input_grad[:2]
    return (
        _put(grad, None, index, grad.shape[1]) if old else None,
        gather_tokens(grad, index) if new else None,
        None,
        None,
    )


_put.register_autograd(_put_grads, setup_context=_save_index)


@torch.library.custom_op('itt_composer::gather_tokens', mutates_args=())
def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[b, index[b, k]]``, [B, K, ...]; the backward pass writes every row of the gradient once."""
    return gather_rows(x, index)


@gather_tokens.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(*index.shape, *x.shape[2:])


def _save_index_and_length(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.S = inputs[0].shape[1]


def _gather_grads(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _put(None, grad, ctx.saved_tensors[0], ctx.S), None


gather_tokens.register_autograd(_gather_grads, setup_context=_save_index_and_length)


@torch.library.custom_op('itt_composer::add_weighted', mutates_args=())
def add_weighted(y: Tensor, index: Tensor, z: Tensor, weight: Tensor, alpha: float, phi: Tensor | None) -> Tensor:
    """Return ``y`` with ``alpha * weight[b, k] * z[b, k] * phi`` added to token ``index[b, k]``, rounded once.

    Args:
        y: the hidden states, [B, S, D].
        index: which tokens, [B, K].
        z: the step's results, [B, K, D], of any dtype.
        weight: the gate values, [B, K].
        alpha: a number, which gets no gradient.
        phi: the step encoding, [D]; None: one.
    """
    (B, S, _), K = y.shape, index.shape[1]
    y, z, weight = y.contiguous(), z.contiguous(), weight.contiguous()
    out = torch.empty_like(y)
    with torch.cuda.device_of(y):
        token_kernels.add_weighted_kernel[B * S,](
            y, z, weight, z if phi is None else phi.contiguous(), _slots(index, S), out, alpha,
            K=K, S=S, HAS_PHI=phi is not None, **_width(y),
        )  # fmt: skip
    return out


@add_weighted.register_fake
def _(y: Tensor, index: Tensor, z: Tensor, weight: Tensor, alpha: float, phi: Tensor | None) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op('itt_composer::add_weighted_backward', mutates_args=())
def _add_weighted_backward(
    dout: Tensor, index: Tensor, z: Tensor, weight: Tensor, alpha: float, phi: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of z, weight and phi; the last one is empty without phi."""
    (B, S, D), K = dout.shape, index.shape[1]
    dout, z, weight, index = dout.contiguous(), z.contiguous(), weight.contiguous(), index.contiguous()
    dz, dweight = torch.empty_like(z), torch.empty_like(weight)
    programs = triton.cdiv(B * K, ROWS)
    dphi = z.new_empty(programs if phi is not None else 0, D, dtype=torch.float32)
    with torch.cuda.device_of(dout):
        token_kernels.add_weighted_grad_kernel[programs,](
            dout, z, weight, z if phi is None else phi.contiguous(), index, dz, dweight, dphi, alpha,
            BK=B * K, K=K, S=S, HAS_PHI=phi is not None, ROWS=ROWS, **_width(dout),
        )  # fmt: skip
    return dz, dweight, dphi.new_empty(0) if phi is None else dphi.sum(0).to(phi.dtype)


@_add_weighted_backward.register_fake
def _(
    dout: Tensor, index: Tensor, z: Tensor, weight: Tensor, alpha: float, phi: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dphi = dout.new_empty(0, dtype=torch.float32) if phi is None else torch.empty_like(phi)
    dz, dweight = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (z, weight))
    return dz, dweight, dphi


def _save_weighted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, z, weight, ctx.alpha, phi = inputs
    ctx.save_for_backward(index, z, weight, phi)


def _weighted_grads(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    index, z, weight, phi = ctx.saved_tensors
    dz, dweight, dphi = _add_weighted_backward(dout, index, z, weight, ctx.alpha, phi)
    return dout, None, dz, dweight, None, None if phi is None else dphi


add_weighted.register_autograd(_weighted_grads, setup_context=_save_weighted)
