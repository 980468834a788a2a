"""Routed attention on a CPU, at the cost of the pairs that are seen.

B batch, S keys, K queries, C queries of a chunk, H heads, E head size.

PyTorch's kernel for CPUs computes every key that it is given, masked or not: for routed tokens twice what is seen. Here
the queries go chunk by chunk, each with the keys up to its last position, forward and backward through that same
kernel; autograd's own backward pass through the slices would copy complete gradients for every chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 64


def chunked_attention(
    q_BHKE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, index_BK: Tensor, padding_BS: Tensor | None
) -> Tensor:
    """Queries at positions ``index_BK`` over the keys up to their own; arguments as of ``causal_attention``."""
    return _ChunkedAttention.apply(q_BHKE, k_BHSE, v_BHSE, index_BK, padding_BS)


def _keys_seen(index_BK: Tensor) -> list[int]:
    """How many keys each chunk of queries sees: up to the last position in it, in any sequence."""
    last_K = index_BK.amax(0).tolist()
    return [max(last_K[start : start + CHUNK]) + 1 for start in range(0, len(last_K), CHUNK)]


def _masks(index_BK: Tensor, padding_BS: Tensor | None, seen: list[int], dtype: torch.dtype) -> list[Tensor]:
    """For each chunk [B or 1, 1, C, seen]: 0 where a query may look, -inf elsewhere."""
    chunks = index_BK.split(CHUNK, dim=1)
    if padding_BS is not None:
        views = [visible(index_BC, padding_BS[:, :n], n) for index_BC, n in zip(chunks, seen, strict=True)]
        return [torch.zeros(view.shape, dtype=dtype).masked_fill_(~view, -torch.inf)[:, None] for view in views]
    # Zeros and then -inf: a query's row is a window of it that starts so as to leave a zero for each key it sees.
    S = max(seen)
    step = torch.zeros(2 * S, dtype=dtype)
    step[S:] = -torch.inf
    starts = (S - 1 - index_BK).split(CHUNK, dim=1)
    return [
        step.unfold(0, n, 1).index_select(0, start_BC.flatten()).view(len(start_BC), 1, -1, n)
        for start_BC, n in zip(starts, seen, strict=True)
    ]


def visible(index_BK: Tensor, padding_BS: Tensor | None, S: int) -> Tensor:
    """[B or 1, K, S], True where a query may look. Padding sees itself, so that no row of the softmax is empty."""
    key_S = torch.arange(S, device=index_BK.device)
    visible_BKS = key_S <= index_BK[..., None]
    if padding_BS is not None:
        visible_BKS = visible_BKS & (padding_BS[:, None] | (key_S == index_BK[..., None]))
    return visible_BKS


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHKE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, index_BK: Tensor, padding_BS: Tensor | None
    ) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        ctx.seen = _keys_seen(index_BK)
        masks = _masks(index_BK, padding_BS, ctx.seen, q_BHKE.dtype)
        outs, log_sums = [], []
        for q_BHCE, n, mask in zip(q_BHKE.split(CHUNK, dim=2), ctx.seen, masks, strict=True):
            out, log_sum = kernel(q_BHCE, k_BHSE.narrow(2, 0, n), v_BHSE.narrow(2, 0, n), attn_mask=mask)
            outs.append(out)
            log_sums.append(log_sum)
        ctx.save_for_backward(q_BHKE, k_BHSE, v_BHSE, *outs, *log_sums, *masks)
        return torch.cat(outs, dim=2)

    @staticmethod
    def backward(ctx: Any, grad_BHKE: Tensor) -> tuple[Tensor | None, ...]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q_BHKE, k_BHSE, v_BHSE, *saved = ctx.saved_tensors
        chunks = len(ctx.seen)
        grad_q, grad_k, grad_v = [], torch.zeros_like(k_BHSE), torch.zeros_like(v_BHSE)
        for grad_BHCE, q_BHCE, n, out, log_sum, mask in zip(
            *(grad_BHKE.split(CHUNK, dim=2), q_BHKE.split(CHUNK, dim=2), ctx.seen),
            *(saved[:chunks], saved[chunks : 2 * chunks], saved[2 * chunks :]),
            strict=True,
        ):
            keys, values = k_BHSE.narrow(2, 0, n), v_BHSE.narrow(2, 0, n)
            more_q, more_k, more_v = kernel(grad_BHCE, q_BHCE, keys, values, out, log_sum, 0.0, False, attn_mask=mask)
            grad_q.append(more_q)
            grad_k.narrow(2, 0, n).add_(more_k)
            grad_v.narrow(2, 0, n).add_(more_v)
        return torch.cat(grad_q, dim=2), grad_k, grad_v, None, None
