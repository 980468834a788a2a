"""Adaptive token routing (Section 3.3): scores in, chosen tokens and their weights out.

B batch, S sequence, K chosen tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from itt_composer import ops
from itt_composer.thinking_options import round_up, token_count


@dataclass
class Selection:
    """The tokens that one step processes.

    ``index_BK`` are positions in the sequence, unique within a row, the chosen ones first and ascending. Rows that
    chose fewer than K tokens are filled up with tokens that were not chosen, for which ``valid_BK`` is False and
    whose results are dropped; ``valid_BK`` is None when there are none.
    """

    index_BK: Tensor
    valid_BK: Tensor | None = None

    @classmethod
    def from_mask(cls, chosen_BS: Tensor, token_multiple: int = 1) -> Selection:
        """The tokens where ``chosen_BS`` is True; rows may choose different numbers. Waits for the device."""
        S = chosen_BS.shape[1]
        K = round_up(max(1, int(chosen_BS.sum(-1).max())), token_multiple, S)
        index_BK = (~chosen_BS).to(torch.uint8).argsort(dim=-1, stable=True)[:, :K]
        return cls(index_BK, chosen_BS.gather(1, index_BK))

    def mask(self, S: int) -> Tensor:
        """[B, S], True for the chosen tokens."""
        mask_BS = torch.zeros(self.index_BK.shape[0], S, dtype=torch.bool, device=self.index_BK.device)
        return mask_BS.scatter(1, self.index_BK, True if self.valid_BK is None else self.valid_BK)

    def gather(self, x_BS: Tensor) -> Tensor:
        """The chosen tokens of ``x_BS``, [B, K, ...]."""
        return ops.gather_tokens(x_BS, self.index_BK)

    def add(self, x_BS: Tensor, update_BK: Tensor) -> Tensor:
        """``x_BS`` with ``update_BK`` added to the chosen tokens."""
        if self.valid_BK is not None:
            update_BK = torch.where(self._valid_like(update_BK), update_BK, 0)
        return ops.add_to_tokens(x_BS, self.index_BK, update_BK)

    def replace(self, x_BS: Tensor, new_BK: Tensor) -> Tensor:
        """``x_BS`` with the chosen tokens replaced by ``new_BK``."""
        if self.valid_BK is not None:
            new_BK = torch.where(self._valid_like(new_BK), new_BK, self.gather(x_BS))
        return ops.replace_tokens(x_BS, self.index_BK, new_BK)

    def _valid_like(self, x_BK: Tensor) -> Tensor:
        assert self.valid_BK is not None
        return self.valid_BK.view(*self.valid_BK.shape, *[1] * (x_BK.dim() - 2))


def top_k(score_BS: Tensor, k: int) -> Selection:
    """The ``k`` tokens with the highest scores in each sequence, in their order in the sequence."""
    return Selection(score_BS.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values)


def top_k_padded(score_BS: Tensor, capacity: float, padding_BS: Tensor, token_multiple: int = 1) -> Selection:
    """``top_k`` within the tokens that are not padding, of which each sequence may have another number."""
    lengths = padding_BS.sum(-1).tolist()
    k_B = torch.tensor([token_count(capacity, length, token_multiple) for length in lengths], device=score_BS.device)
    order_BS = score_BS.masked_fill(~padding_BS, -math.inf).argsort(dim=-1, descending=True)
    rank_BS = order_BS.argsort(dim=-1)
    return Selection.from_mask((rank_BS < k_B[:, None]) & padding_BS, token_multiple)


def top_p(score_BS: Tensor, p: float, padding_BS: Tensor | None = None, token_multiple: int = 1) -> Selection:
    """The fewest tokens that hold a share ``p`` of the sequence's softmax over scores (Table 3, 'Top-P')."""
    if padding_BS is not None:
        score_BS = score_BS.masked_fill(~padding_BS, -math.inf)
    share_BS, order_BS = score_BS.softmax(-1).sort(dim=-1, descending=True)
    before_BS = share_BS.cumsum(-1) - share_BS
    chosen_BS = torch.zeros_like(order_BS, dtype=torch.bool).scatter(1, order_BS, before_BS < p)
    if padding_BS is not None:
        chosen_BS = chosen_BS & padding_BS
    return Selection.from_mask(chosen_BS, token_multiple)


def above_threshold(
    score_BS: Tensor, threshold: Tensor, padding_BS: Tensor | None = None, token_multiple: int = 1
) -> Selection:
    """The tokens whose own score exceeds ``threshold``: the one rule that does not look ahead."""
    chosen_BS = score_BS > threshold
    if padding_BS is not None:
        chosen_BS = chosen_BS & padding_BS
    return Selection.from_mask(chosen_BS, token_multiple)


def lowest_chosen(score_BS: Tensor, chosen: Selection) -> Tensor:
    """The lowest score among each sequence's chosen tokens, [B]; under ``top_k`` the k-th largest."""
    score_BK = chosen.gather(score_BS)
    if chosen.valid_BK is not None:
        score_BK = score_BK.masked_fill(~chosen.valid_BK, math.inf)
    return score_BK.amin(-1)


def weigh(score: Tensor, weight_norm: str, temperature: float) -> Tensor:
    """A token's weight, sigmoid or tanh of its score over the temperature (Table 3, 'Router Weight Norm')."""
    return torch.sigmoid(score / temperature) if weight_norm == 'sigmoid' else torch.tanh(score / temperature)
