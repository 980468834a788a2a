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
    whose results are dropped; ``valid_BK`` is None when there are none. ``row_R`` are the sequences that take the step
    at all, for which alone ``index_BK`` and ``valid_BK`` then have rows; None: all of them.
    """

    index_BK: Tensor
    valid_BK: Tensor | None = None
    row_R: Tensor | None = None
    chosen_BS: Tensor | None = None
    """The choice as a mask, where it was made as one."""

    @classmethod
    def from_mask(cls, chosen_BS: Tensor, token_multiple: int = 1, leave_out_rows: bool = False) -> Selection:
        """The tokens where ``chosen_BS`` is True; rows may choose different numbers. Waits for the device.

        Args:
            chosen_BS: the choice, [B, S].
            token_multiple: K is rounded up to a multiple of this.
            leave_out_rows: leave out the sequences that chose nothing, so that they cost nothing.
        """
        row_R, picked_RS, S = None, chosen_BS, chosen_BS.shape[1]
        if leave_out_rows:
            row_R = chosen_BS.any(-1).nonzero().squeeze(-1)
            if len(row_R) == len(chosen_BS):
                row_R = None
            else:
                picked_RS = chosen_BS[row_R]
        most = int(picked_RS.sum(-1).max()) if len(picked_RS) else 0
        K = round_up(max(1, most), token_multiple, S)
        index_RK = (~picked_RS).to(torch.uint8).argsort(dim=-1, stable=True)[:, :K]
        return cls(index_RK, picked_RS.gather(1, index_RK), row_R, chosen_BS)

    @property
    def is_empty(self) -> bool:
        """Whether no sequence takes the step; never in training, where every parameter must take part."""
        return len(self.index_BK) == 0

    def mask(self, S: int) -> Tensor:
        """[B, S], True for the chosen tokens."""
        if self.chosen_BS is not None:
            return self.chosen_BS
        mask_BS = torch.zeros(self.index_BK.shape[0], S, dtype=torch.bool, device=self.index_BK.device)
        return mask_BS.scatter(1, self.index_BK, True)

    def rows(self, x_B: Tensor) -> Tensor:
        """The sequences of ``x_B`` that take the step, [R, ...]."""
        return x_B if self.row_R is None else x_B[self.row_R]

    def gather(self, x_BS: Tensor) -> Tensor:
        """The chosen tokens of ``x_BS``, [B, K, ...]."""
        if self.is_empty:
            return x_BS[:0, :1]
        if self._takes_all_of(x_BS):
            return self.rows(x_BS)
        return ops.gather_tokens(self.rows(x_BS), self.index_BK)

    def add(self, x_BS: Tensor, update_BK: Tensor) -> Tensor:
        """``x_BS`` with ``update_BK`` added to the chosen tokens."""
        if self.is_empty:
            return x_BS
        if self._takes_all_of(x_BS):
            return self._put_rows(x_BS, self.rows(x_BS) + update_BK)
        if self.valid_BK is not None:
            update_BK = torch.where(self._valid_like(update_BK), update_BK, 0)
        return self._put_rows(x_BS, ops.add_to_tokens(self.rows(x_BS), self.index_BK, update_BK))

    def add_weighted(
        self, y_BSD: Tensor, z_BKD: Tensor, weight_BK1: Tensor, alpha: float, phi_D: Tensor | None
    ) -> Tensor:
        """``y_BSD`` with ``(alpha * weight * z) * phi`` added to the chosen tokens (Eq. 4 and 6)."""
        weight_BK = weight_BK1.squeeze(-1)
        if self._takes_all_of(y_BSD):
            return self.add(y_BSD, ops.weighted(z_BKD, weight_BK, alpha, phi_D).to(y_BSD.dtype))
        if self.valid_BK is not None:
            weight_BK = torch.where(self.valid_BK, weight_BK, 0)
        return self._put_rows(y_BSD, ops.add_weighted(self.rows(y_BSD), self.index_BK, z_BKD, weight_BK, alpha, phi_D))

    def replace(self, x_BS: Tensor, new_BK: Tensor) -> Tensor:
        """``x_BS`` with the chosen tokens replaced by ``new_BK``."""
        if self.is_empty:
            return x_BS
        if self._takes_all_of(x_BS):
            return self._put_rows(x_BS, new_BK)
        if self.valid_BK is not None:
            new_BK = torch.where(self._valid_like(new_BK), new_BK, self.gather(x_BS))
        return self._put_rows(x_BS, ops.replace_tokens(self.rows(x_BS), self.index_BK, new_BK))

    def _takes_all_of(self, x_BS: Tensor) -> bool:
        """Whether the sequences that take the step do so with all their tokens."""
        return self.valid_BK is None and self.index_BK.shape[1] == x_BS.shape[1]

    def _put_rows(self, x_BS: Tensor, new_RS: Tensor) -> Tensor:
        return new_RS if self.row_R is None else x_BS.index_copy(0, self.row_R, new_RS)

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
    score_BS: Tensor,
    threshold: Tensor | float,
    padding_BS: Tensor | None = None,
    token_multiple: int = 1,
    leave_out_rows: bool = False,
) -> Selection:
    """The tokens whose own score exceeds ``threshold``: the one rule that does not look ahead."""
    chosen_BS = score_BS > threshold
    if padding_BS is not None:
        chosen_BS = chosen_BS & padding_BS
    return Selection.from_mask(chosen_BS, token_multiple, leave_out_rows)


def one_token_above_threshold(
    score_B1: Tensor, threshold: Tensor | float, padding_B1: Tensor | None = None
) -> Selection | None:
    """:func:`above_threshold` in decoding, where each sequence has one new token; None where all take the step."""
    chosen_B1 = score_B1 > threshold
    if padding_B1 is not None:
        chosen_B1 = chosen_B1 & padding_B1
    row_R = [b for b, (takes,) in enumerate(chosen_B1.tolist()) if takes]
    if len(row_R) == len(chosen_B1):
        return None
    index_R1 = torch.zeros(len(row_R), 1, dtype=torch.int64, device=score_B1.device)
    return Selection(index_R1, row_R=torch.tensor(row_R, device=score_B1.device), chosen_BS=chosen_B1)


def lowest_chosen(score_BS: Tensor, chosen: Selection) -> Tensor:
    """The lowest score among each sequence's chosen tokens, [B]; under ``top_k`` the k-th largest."""
    score_BK = chosen.gather(score_BS)
    if chosen.valid_BK is not None:
        score_BK = score_BK.masked_fill(~chosen.valid_BK, math.inf)
    return score_BK.amin(-1)


def weigh(score: Tensor, weight_norm: str, temperature: float) -> Tensor:
    """A token's weight, sigmoid or tanh of its score over the temperature (Table 3, 'Router Weight Norm')."""
    return torch.sigmoid(score / temperature) if weight_norm == 'sigmoid' else torch.tanh(score / temperature)
