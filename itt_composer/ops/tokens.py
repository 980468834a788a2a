"""Read and write the routed tokens of a sequence, at a cost that follows their number.

B batch, S sequence, K routed tokens; ``...`` any trailing dimensions (D hidden, or heads and head size).

``index_BK`` holds positions in [0, S) that are unique within a row, which makes every backward pass here a plain row
copy. PyTorch's own ``gather`` must allow for repeated indices; its ``index_add`` and ``index_copy`` save the added or
copied tokens for their backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itt_composer.ops.device import KERNEL_DTYPES, kernels_for


def last_tokens(x_BS: Tensor, last: int) -> Tensor:
    """The last ``last`` tokens; 0: ``x`` itself, as even a complete slice copies the gradient in its backward pass."""
    return x_BS[:, -last:] if last else x_BS


def gather_tokens(x_BS: Tensor, index_BK: Tensor) -> Tensor:
    """The routed tokens, ``x[b, index[b, k]]``: [B, S, ...] to [B, K, ...]."""
    if x_BS.dim() == 2:
        return x_BS.gather(1, index_BK)
    kernels = kernels_for(x_BS)
    if kernels is not None:
        return kernels.gather_tokens(x_BS, index_BK)
    return _Gather.apply(x_BS, index_BK) if x_BS.requires_grad else gather_rows(x_BS, index_BK)


def add_to_tokens(x_BS: Tensor, index_BK: Tensor, update_BK: Tensor) -> Tensor:
    """``x`` with ``update[b, k]`` added to token ``index[b, k]``; every other token keeps its bits."""
    if x_BS.requires_grad or update_BK.requires_grad:
        return _Add.apply(x_BS, index_BK, update_BK)
    return _add_to_rows(x_BS, _row_index(index_BK, x_BS.shape[1]), update_BK)


def add_weighted(
    y_BSD: Tensor, index_BK: Tensor, z_BKD: Tensor, weight_BK: Tensor, alpha: float, phi_D: Tensor | None
) -> Tensor:
    """``y`` with ``alpha * weight[b, k] * z[b, k] * phi`` added to token ``index[b, k]``; without phi where it is None.

    Every other token keeps its bits.
    """
    kernels = kernels_for(y_BSD) if y_BSD.dtype in KERNEL_DTYPES else None
    if kernels is not None:
        return kernels.add_weighted(y_BSD, index_BK, z_BKD, weight_BK, alpha, phi_D)
    return add_to_tokens(y_BSD, index_BK, weighted(z_BKD, weight_BK, alpha, phi_D).to(y_BSD.dtype))


def weighted(z_BKD: Tensor, weight_BK: Tensor, alpha: float, phi_D: Tensor | None) -> Tensor:
    """``(alpha * weight * z) * phi``, what a step adds to a token's hidden state (Eq. 4 and 6)."""
    update_BKD = alpha * weight_BK[..., None] * z_BKD
    return update_BKD if phi_D is None else update_BKD * phi_D


def replace_tokens(x_BS: Tensor, index_BK: Tensor, new_BK: Tensor) -> Tensor:
    """``x`` with token ``index[b, k]`` replaced by ``new[b, k]``; every other token keeps its bits."""
    kernels = kernels_for(x_BS)
    if kernels is not None:
        return kernels.replace_tokens(x_BS, index_BK, new_BK)
    if x_BS.requires_grad or new_BK.requires_grad:
        return _Replace.apply(x_BS, index_BK, new_BK)
    return _replace_rows(x_BS, _row_index(index_BK, x_BS.shape[1]), new_BK)


def _row_index(index_BK: Tensor, S: int) -> Tensor:
    """The routed tokens as rows of the [B * S, ...] view, flat."""
    B = index_BK.shape[0]
    if B == 1:
        return index_BK[0]
    return (index_BK + torch.arange(0, B * S, S, device=index_BK.device).unsqueeze(1)).flatten()


def _take_rows(x_BS: Tensor, row_N: Tensor) -> Tensor:
    B = x_BS.shape[0]
    return x_BS.flatten(0, 1).index_select(0, row_N).view(B, row_N.shape[0] // B, *x_BS.shape[2:])


def _add_to_rows(x_BS: Tensor, row_N: Tensor, update_BK: Tensor) -> Tensor:
    return x_BS.flatten(0, 1).clone().index_add_(0, row_N, update_BK.flatten(0, 1)).view(x_BS.shape)


def _replace_rows(x_BS: Tensor, row_N: Tensor, new_BK: Tensor) -> Tensor:
    return x_BS.flatten(0, 1).clone().index_copy_(0, row_N, new_BK.flatten(0, 1)).view(x_BS.shape)


def gather_rows(x_BS: Tensor, index_BK: Tensor) -> Tensor:
    """``gather_tokens`` without its backward pass."""
    return _take_rows(x_BS, _row_index(index_BK, x_BS.shape[1]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, index_BK: Tensor) -> Tensor:
        row_N = _row_index(index_BK, x_BS.shape[1])
        ctx.save_for_backward(row_N)
        ctx.shape = x_BS.shape
        return _take_rows(x_BS, row_N)

    @staticmethod
    def backward(ctx: Any, grad_BK: Tensor) -> tuple[Tensor, None]:
        (row_N,) = ctx.saved_tensors
        grad_x = grad_BK.new_zeros(ctx.shape)
        grad_x.flatten(0, 1).index_copy_(0, row_N, grad_BK.flatten(0, 1))
        return grad_x, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, index_BK: Tensor, update_BK: Tensor) -> Tensor:
        row_N = _row_index(index_BK, x_BS.shape[1])
        ctx.save_for_backward(row_N)
        return _add_to_rows(x_BS, row_N, update_BK)

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None, Tensor]:
        return grad_BS, None, _take_rows(grad_BS, ctx.saved_tensors[0])


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, index_BK: Tensor, new_BK: Tensor) -> Tensor:
        row_N = _row_index(index_BK, x_BS.shape[1])
        ctx.save_for_backward(row_N)
        return _replace_rows(x_BS, row_N, new_BK)

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None, Tensor]:
        (row_N,) = ctx.saved_tensors
        grad_x = grad_BS.flatten(0, 1).clone().index_fill_(0, row_N, 0).view(grad_BS.shape)
        return grad_x, None, _take_rows(grad_BS, row_N)
