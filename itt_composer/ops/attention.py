"""Causal attention over all tokens of a sequence, or for routed ones.

B batch, S sequence, K queries (all S tokens, or the routed ones), H heads, G key-value heads, E head size.

With the routed tokens at positions 1, 2 and 5 of 6, each query sees the keys up to its own position::

    key     0 1 2 3 4 5
    query 1 x x
    query 2 x x x
    query 5 x x x x x x

All tokens of a sequence take PyTorch's own causal kernels. For routed ones there are two implementations, values of
``attention_backend``::

    triton    kernels of this package, which skip the keys that a block of queries does not see
    sdpa      every key for every query, and a mask; runs anywhere
    auto      triton where its kernels run, else sdpa
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from itt_composer.ops.cpu_attention import chunked_attention, visible
from itt_composer.ops.device import KERNEL_DTYPES, kernels_for
from itt_composer.options import KERNEL_HEAD_SIZES


def causal_attention(
    q_BKHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    index_BK: Tensor | None = None,
    padding_BS: Tensor | None = None,
    backend: str = 'auto',
) -> Tensor:
    """Scaled dot-product attention in which a query sees the keys up to its own position.

    Args:
        q_BKHE: queries, [B, K, H, E].
        k_BSGE: keys, [B, S, G, E]; each of the G heads serves H / G query heads.
        v_BSGE: values, [B, S, G, E].
        index_BK: position of each query among the keys, [B, K], or [1, K] where all sequences have the same. None: the
            queries are the last K of the keys, in order.
        padding_BS: False where a key is padding that nobody but itself may see. None: no padding.
        backend: ``auto``, ``triton`` or ``sdpa``, for queries with an index; padding always takes ``sdpa``.

    Returns:
        [B, K, H, E].

    Raises:
        ValueError: ``triton`` on a device, or for a head size, that its kernels do not run on.
    """
    if index_BK is not None and padding_BS is None:
        kernels = None if backend == 'sdpa' else _kernels(q_BKHE, backend)
        if kernels is not None:
            return kernels.routed_attention(q_BKHE, k_BSGE, v_BSGE, index_BK.expand(len(q_BKHE), -1))
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
    if q_BKHE.is_cpu and not torch.compiler.is_compiling():
        return chunked_attention(q_BHKE, k_BHSE, v_BHSE, index_BK, padding_BS).transpose(1, 2)
    visible_BKS = visible(index_BK, padding_BS, S)
    return F.scaled_dot_product_attention(q_BHKE, k_BHSE, v_BHSE, attn_mask=visible_BKS[:, None]).transpose(1, 2)


def attention_with_weights(
    q_BKHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, padding_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``causal_attention`` of the last K tokens, and its weights, [B, H, K, S]: all pairs are computed and returned."""
    (_, K, H, E), S = q_BKHE.shape, k_BSGE.shape[1]
    k_BSHE, v_BSHE = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k_BSGE, v_BSGE))
    visible_BKS = visible(torch.arange(S - K, S, device=q_BKHE.device)[None], padding_BS, S)
    score_BHKS = torch.einsum('bkhe,bshe->bhks', q_BKHE, k_BSHE) / math.sqrt(E)
    score_BHKS = score_BHKS.masked_fill(~visible_BKS[:, None], -math.inf)
    weight_BHKS = score_BHKS.softmax(-1, dtype=torch.promote_types(q_BKHE.dtype, torch.float32)).to(q_BKHE.dtype)
    return torch.einsum('bhks,bshe->bkhe', weight_BHKS, v_BSHE), weight_BHKS


def _kernels(q_BKHE: Tensor, backend: str) -> ModuleType | None:
    """The Triton kernels, or None where ``auto`` must do without them."""
    E, kernels = q_BKHE.shape[-1], kernels_for(q_BKHE)
    if kernels is not None and E in KERNEL_HEAD_SIZES and q_BKHE.dtype in KERNEL_DTYPES:
        return kernels
    if backend == 'triton':
        problem = (
            f'needs a CUDA device and the package itt_composer, and the tensors are on {q_BKHE.device}'
            if kernels is None
            else f'has no kernels for {q_BKHE.dtype} and head size {E}'
        )
        raise ValueError(f'attention_backend: triton {problem}; set attention_backend: auto')
    return None
