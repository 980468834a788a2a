"""Causal attention, whole or routed.

B batch, S sequence, K queries (all S tokens, or the chosen ones), H heads, G key-value heads, E head size.

Routed, with the chosen tokens at positions 1, 2 and 5 of 6, each query sees the keys up to its own position::

    key     0 1 2 3 4 5
    query 1 x x
    query 2 x x x
    query 5 x x x x x x
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itt_composer.ops.cpu_attention import chunked_attention, visible


def causal_attention(
    q_BKHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    index_BK: Tensor | None = None,
    padding_BS: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention in which a query sees the keys up to its own position.

    Args:
        q_BKHE: queries, [B, K, H, E].
        k_BSGE: keys, [B, S, G, E]; each of the G heads serves H / G query heads.
        v_BSGE: values, [B, S, G, E].
        index_BK: position of each query among the keys. None: the queries are the last K of the keys, in order.
        padding_BS: False where a key is padding that nobody but itself may see. None: no padding.

    Returns:
        [B, K, H, E].
    """
    group = q_BKHE.shape[2] // k_BSGE.shape[2]
    q_BHKE = q_BKHE.transpose(1, 2)
    k_BHSE = k_BSGE.repeat_interleave(group, dim=2).transpose(1, 2) if group > 1 else k_BSGE.transpose(1, 2)
    v_BHSE = v_BSGE.repeat_interleave(group, dim=2).transpose(1, 2) if group > 1 else v_BSGE.transpose(1, 2)
    K, S = q_BKHE.shape[1], k_BSGE.shape[1]
    if index_BK is None and padding_BS is None and K in (1, S):
        # A single last query sees every key; PyTorch's own causal mask would show it the first.
        causal = True if K > 1 else False  # noqa: SIM210 (to the compiler K > 1 is a symbol, which SDPA rejects)
        return F.scaled_dot_product_attention(q_BHKE, k_BHSE, v_BHSE, is_causal=causal).transpose(1, 2)
    if index_BK is None:
        index_BK = torch.arange(S - K, S, device=q_BKHE.device)[None]
    if q_BKHE.is_cpu and q_BKHE.requires_grad and not torch.compiler.is_compiling():
        return chunked_attention(q_BHKE, k_BHSE, v_BHSE, index_BK, padding_BS).transpose(1, 2)
    visible_BKS = visible(index_BK, padding_BS, S)
    return F.scaled_dot_product_attention(q_BHKE, k_BHSE, v_BHSE, attn_mask=visible_BKS[:, None]).transpose(1, 2)
