"""Adaptive token routing (Section 3.3): scores in, the choice of tokens and their weights out.

B batch, S sequence, K chosen tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from itt_composer.model.selection import Selection
from itt_composer.options import token_count


def top_k(score_BS: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` tokens with the highest scores in each sequence, ascending, [B, k]."""
    return score_BS.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def top_k_padded(score_BS: Tensor, capacity: float, padding_BS: Tensor, token_multiple: int = 1) -> Tensor:
    """``top_k`` within the tokens that are not padding, of which sequences may have different numbers: [B, S], bool."""
    lengths = padding_BS.sum(-1).tolist()
    k_B = torch.tensor([token_count(capacity, length, token_multiple) for length in lengths], device=score_BS.device)
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
    chosen_BS = torch.zeros_like(order_BS, dtype=torch.bool).scatter(1, order_BS, before_BS < p)
    return chosen_BS if padding_BS is None else chosen_BS & padding_BS


def above_threshold(score_BS: Tensor, threshold: Tensor | float, padding_BS: Tensor | None = None) -> Tensor:
    """[B, S], True for tokens whose own score exceeds ``threshold``: the one rule that does not look ahead."""
    chosen_BS = score_BS > threshold
    return chosen_BS if padding_BS is None else chosen_BS & padding_BS


def lowest_chosen(score_BS: Tensor, chosen: Selection) -> Tensor:
    """The lowest score among each sequence's chosen tokens, [B]; under ``top_k`` the k-th largest.

    NaN for a sequence that chose none, as one of padding alone does.
    """
    score_BK = chosen.gather(score_BS)
    if chosen.valid_BK is None:
        return score_BK.amin(-1)
    lowest_B = score_BK.masked_fill(~chosen.valid_BK, math.inf).amin(-1)
    return lowest_B.masked_fill(lowest_B == math.inf, math.nan)


def weigh(score: Tensor, weight_norm: str, temperature: float) -> Tensor:
    """A token's weight, sigmoid or tanh of its score over the temperature (Table 3, 'Router Weight Norm')."""
    return torch.sigmoid(score / temperature) if weight_norm == 'sigmoid' else torch.tanh(score / temperature)
