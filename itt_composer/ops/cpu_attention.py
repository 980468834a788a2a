"""Routed attention in training on a CPU, at the cost of the pairs that are seen.

B batch, S keys, K queries, C queries of a chunk, H heads, E head size.

PyTorch's kernel for CPUs works through every key that it is given, masked or not: for chosen tokens twice what is
seen. Here the queries go chunk by chunk, each with the keys up to its last position, forward and backward through that
same kernel; autograd's own way back through the slices would copy whole gradients for every chunk.

Where a chunk ends follows from tokens after a query, and can turn the last bit of its result: for training only.
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


def _chunks(index_BK: Tensor) -> list[tuple[slice, int]]:
    """Each chunk of queries, and how many keys they see."""
    parts = index_BK.split(CHUNK, dim=1)
    return [(slice(i * CHUNK, (i + 1) * CHUNK), int(part.max()) + 1) for i, part in enumerate(parts)]


def _hidden(index_BC: Tensor, padding_BS: Tensor | None, seen: int, dtype: torch.dtype) -> Tensor:
    """[B or 1, 1, C, seen]: 0 where a query may look, -inf elsewhere."""
    if padding_BS is not None:
        visible_BCS = visible(index_BC, padding_BS[:, :seen], seen)
        return torch.zeros(visible_BCS.shape, dtype=dtype).masked_fill_(~visible_BCS, -torch.inf)[:, None]
    # Zeros and then -inf: a query's row is a window of it that starts so as to leave a zero for each key it sees.
    step = torch.zeros(2 * seen, dtype=dtype)
    step[seen:] = -torch.inf
    rows = step.unfold(0, seen, 1).index_select(0, (seen - 1 - index_BC).flatten())
    return rows.view(*index_BC.shape, seen)[:, None]


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
        outs, log_sums = [], []
        for chunk, seen in _chunks(index_BK):
            hidden = _hidden(index_BK[:, chunk], padding_BS, seen, q_BHKE.dtype)
            out, log_sum = kernel(q_BHKE[:, :, chunk], k_BHSE[:, :, :seen], v_BHSE[:, :, :seen], attn_mask=hidden)
            outs.append(out)
            log_sums.append(log_sum)
        ctx.save_for_backward(q_BHKE, k_BHSE, v_BHSE, index_BK, padding_BS, *outs, *log_sums)
        return torch.cat(outs, dim=2)

    @staticmethod
    def backward(ctx: Any, grad_BHKE: Tensor) -> tuple[Tensor | None, ...]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q_BHKE, k_BHSE, v_BHSE, index_BK, padding_BS, *saved = ctx.saved_tensors
        outs, log_sums = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        grad_q, grad_k, grad_v = torch.empty_like(q_BHKE), torch.zeros_like(k_BHSE), torch.zeros_like(v_BHSE)
        for (chunk, seen), out, log_sum in zip(_chunks(index_BK), outs, log_sums, strict=True):
            hidden = _hidden(index_BK[:, chunk], padding_BS, seen, q_BHKE.dtype)
            keys, values = k_BHSE[:, :, :seen], v_BHSE[:, :, :seen]
            more_q, more_k, more_v = kernel(
                *(grad_BHKE[:, :, chunk], q_BHKE[:, :, chunk], keys, values, out, log_sum, 0.0, False),
                attn_mask=hidden,
            )
            grad_q[:, :, chunk] = more_q
            grad_k[:, :, :seen].add_(more_k)
            grad_v[:, :, :seen].add_(more_v)
        return grad_q, grad_k, grad_v, None, None
