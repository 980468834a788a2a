"""Adaptive token routing (Section 3.3): scores in, the routed tokens and their gate values out.

B batch, S sequence, K routed tokens of each sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from itt_composer.model.selection import Selection, exporting
from itt_composer.options import token_count


def top_k(score_BS: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` tokens with the highest scores in each sequence, ascending, [B, k]."""
    return score_BS.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


@torch.compiler.disable
def top_k_padded(score_BS: Tensor, ratio: float, padding_BS: Tensor, token_multiple: int = 1) -> Tensor:
    """``top_k`` within the tokens that are not padding, of which sequences may have different numbers: [B, S], bool."""
    lengths = padding_BS.sum(-1).tolist()
    k_B = torch.tensor([token_count(ratio, length, token_multiple) for length in lengths], device=score_BS.device)
    order_BS = score_BS.masked_fill(~padding_BS, -math.inf).argsort(dim=-1, descending=True)
    rank_BS = order_BS.argsort(dim=-1)
    return (rank_BS < k_B[:, None]) & padding_BS


def top_p(score_BS: Tensor, p: float, padding_BS: Tensor | None = None) -> Tensor:
    """The fewest tokens with a share ``p`` of the sequence's softmax over scores (Table 3, 'Top-P'): [B, S], bool."""
    if p >= 1:  # Of which a sum in float32 may fall short.
        return torch.ones_like(score_BS, dtype=torch.bool) if padding_BS is None else padding_BS
    if padding_BS is not None:
        score_BS = score_BS.masked_fill(~padding_BS, -math.inf)
    share_BS, order_BS = score_BS.softmax(-1).sort(dim=-1, descending=True)
    before_BS = share_BS.cumsum(-1) - share_BS
    routed_BS = torch.zeros_like(order_BS, dtype=torch.bool).scatter(1, order_BS, before_BS < p)
    return routed_BS if padding_BS is None else routed_BS & padding_BS


def above_threshold(score_BS: Tensor, threshold: Tensor | float, padding_BS: Tensor | None = None) -> Tensor:
    """[B, S], True for tokens whose own score exceeds ``threshold``: the only causal selection."""
    routed_BS = score_BS > threshold
    return routed_BS if padding_BS is None else routed_BS & padding_BS


def rank(
    rule: str,
    score_BS: Tensor,
    ratio: float,
    temperature: float,
    padding_BS: Tensor | None = None,
    token_multiple: int = 1,
    training: bool = True,
) -> Selection:
    """The tokens that ``top_p`` routes, or for any other selection ``top_k``."""
    if exporting() and (padding_BS is not None or rule == 'top_p'):
        raise ValueError(f'torch.export: {rule} routing has shapes that depend on values; set selection: threshold')
    if rule == 'top_p':
        return Selection.from_mask(top_p(score_BS / temperature, ratio, padding_BS), token_multiple, training)
    if padding_BS is not None:
        return Selection.from_mask(top_k_padded(score_BS, ratio, padding_BS, token_multiple), token_multiple, training)
    B, S = score_BS.shape
    count = token_count if exporting() else _token_count
    return Selection((B, S), top_k(score_BS, count(ratio, S, token_multiple)))


@torch.compiler.disable
def _token_count(ratio: float, S: int, token_multiple: int) -> int:
    """Outside a graph, which has no way to round a capacity that changes."""
    return token_count(ratio, S, token_multiple)


def lowest_routed(score_BS: Tensor, ranked: Selection) -> Tensor:
    """The lowest score among each sequence's routed tokens, [B]; infinite for a sequence of padding, with none."""
    score_BK = ranked.gather(score_BS)
    if ranked.valid_RK is not None:
        score_BK = score_BK.masked_fill(~ranked.valid_RK, math.inf)
    return score_BK.amin(-1)


def gate(score: Tensor, weight_norm: str, temperature: float) -> Tensor:
    """A token's gate value, sigmoid or tanh of its score over the temperature (Table 3, 'Router Weight Norm')."""
    return torch.sigmoid(score / temperature) if weight_norm == 'sigmoid' else torch.tanh(score / temperature)
