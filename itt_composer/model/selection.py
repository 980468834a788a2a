"""The tokens that one thinking step processes, and how they are taken out of the sequences and put back.

B batch, S sequence, K chosen tokens of each sequence, N chosen tokens of all sequences together, R sequences that chose
any, C places for the queries of one sequence.

Training takes the same number K of each sequence (:class:`Selection`), so that shapes do not depend on the data.
Elsewhere the numbers differ, and the chosen tokens of all sequences stand in one row (:class:`PackedSelection`), so
that f costs what they cost. Both are used alike: x_BK is [B, K, ...] in the first case and [1, N, ...] in the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from itt_composer import ops
from itt_composer.options import round_up

# Outside training, how many tokens follow must not change a bit of the tokens before. CPU kernels treat the last one to
# three rows of a matrix apart, so f and attention get numbers of tokens that this divides. Products of fewer than
# sixteen rows are summed in another order, so f gets at least so many.
ROW_BLOCK = 8
MIN_ROWS = 16
# Attention gets the queries of so many positions together, with the keys up to the last of these positions: fixed ones,
# since where a chunk of so many queries ends would follow from later tokens too.
POSITION_BLOCK = 128
# Where chosen tokens see one another alone, so many are a chunk, and see the chunks before and their own.
OWN_KEYS_BLOCK = 64


@dataclass
class Places:
    """Where the chosen tokens stand in attention, where each sequence has a row of its own: [R, C]."""

    index_RC: Tensor
    """The token's position in the sequence; at a place where none stands that of the row's first."""
    row_R: Tensor | None = None
    """The sequences that have a row; None: all."""
    take_RC: Tensor | None = None
    """Which of the N stands at a place; None: they stand there in their order."""
    place_N: Tensor | None = None
    valid_RC: Tensor | None = None
    """False at a place where none stands; None: there is no such place."""
    spans: list[tuple[int, int]] | None = None
    """The places from left to right in chunks: how many they are, and how many keys at the end they may not see. None:
    no such chunks."""


@dataclass
class Selection:
    """K tokens of each sequence.

    ``index_BK`` are positions in the sequence, unique within a row, the chosen ones first and ascending. Rows that
    chose fewer than K tokens are filled up with tokens that were not chosen, for which ``valid_BK`` is False and
    whose results are dropped; ``valid_BK`` is None when there are none.
    """

    index_BK: Tensor
    valid_BK: Tensor | None = None
    chosen_BS: Tensor | None = None
    """The choice as a mask, where it was made as one."""

    is_empty = False
    """Never in training, where every parameter must take part."""
    spans = None
    """The places are not in chunks; see :class:`Places`."""

    @classmethod
    def from_mask(cls, chosen_BS: Tensor, token_multiple: int = 1) -> Selection:
        """The tokens where ``chosen_BS`` ([B, S]) is True; rows may choose different numbers. Waits for the device.

        K is the largest number of a row, at least one, rounded up to a multiple of ``token_multiple``.
        """
        K = round_up(max(1, int(chosen_BS.sum(-1).max())), token_multiple, chosen_BS.shape[1])
        index_BK = (~chosen_BS).to(torch.uint8).argsort(dim=-1, stable=True)[:, :K]
        return cls(index_BK, chosen_BS.gather(1, index_BK), chosen_BS)

    def mask(self, S: int) -> Tensor:
        """[B, S], True for the chosen tokens."""
        if self.chosen_BS is not None:
            return self.chosen_BS
        mask_BS = torch.zeros(self.index_BK.shape[0], S, dtype=torch.bool, device=self.index_BK.device)
        return mask_BS.scatter(1, self.index_BK, True)

    def gather(self, x_BS: Tensor) -> Tensor:
        """The chosen tokens of ``x_BS``."""
        return x_BS if self._takes_all_of(x_BS) else ops.gather_tokens(x_BS, self.index_BK)

    def gather_positions(self, table_BS: Tensor) -> Tensor:
        """What ``table_BS`` ([B or 1, S, ...]) has for the chosen tokens' positions."""
        return self.gather(table_BS.expand(self.index_BK.shape[0], *table_BS.shape[1:]))

    def add(self, x_BS: Tensor, update_BK: Tensor) -> Tensor:
        """``x_BS`` with ``update_BK`` added to the chosen tokens."""
        if self._takes_all_of(x_BS):
            return x_BS + update_BK
        if self.valid_BK is not None:
            update_BK = torch.where(self._valid_like(update_BK), update_BK, 0)
        return ops.add_to_tokens(x_BS, self.index_BK, update_BK)

    def add_weighted(
        self, y_BSD: Tensor, z_BKD: Tensor, weight_BK1: Tensor, alpha: float, phi_D: Tensor | None
    ) -> Tensor:
        """``y_BSD`` with ``(alpha * weight * z) * phi`` added to the chosen tokens (Eq. 4 and 6)."""
        weight_BK = weight_BK1.squeeze(-1)
        if self._takes_all_of(y_BSD):
            return self.add(y_BSD, ops.weighted(z_BKD, weight_BK, alpha, phi_D).to(y_BSD.dtype))
        if self.valid_BK is not None:
            weight_BK = torch.where(self.valid_BK, weight_BK, 0)
        return ops.add_weighted(y_BSD, self.index_BK, z_BKD, weight_BK, alpha, phi_D)

    def replace(self, x_BS: Tensor, new_BK: Tensor) -> Tensor:
        """``x_BS`` with the chosen tokens replaced by ``new_BK``."""
        if self._takes_all_of(x_BS):
            return new_BK
        if self.valid_BK is not None:
            new_BK = torch.where(self._valid_like(new_BK), new_BK, self.gather(x_BS))
        return ops.replace_tokens(x_BS, self.index_BK, new_BK)

    @property
    def places(self) -> Places:
        """Where the tokens stand in attention: where they are."""
        return Places(self.index_BK, valid_RC=self.valid_BK)

    def spread(self, x_BK: Tensor) -> Tensor:
        """The chosen tokens with each sequence in a row of its own, as attention needs them."""
        return x_BK

    def collect(self, x_BK: Tensor) -> Tensor:
        """:meth:`spread`'s way back."""
        return x_BK

    def rows(self, x_B: Tensor) -> Tensor:
        """The sequences that :meth:`spread` has rows for."""
        return x_B

    def _takes_all_of(self, x_BS: Tensor) -> bool:
        return self.valid_BK is None and self.index_BK.shape[1] == x_BS.shape[1]

    def _valid_like(self, x_BK: Tensor) -> Tensor:
        assert self.valid_BK is not None
        return self.valid_BK.view(*self.valid_BK.shape, *[1] * (x_BK.dim() - 2))


class PackedSelection:
    """The chosen tokens of all sequences in one row, [1, N, ...].

    It is filled up to a multiple of ``ROW_BLOCK``, and to ``MIN_ROWS`` at least.

    Args:
        chosen_BS: True for the chosen tokens. The device is waited for.
        own_keys: the routed tokens see one another alone (``thinking_kv: routed_only``), so that attention must
            have them one behind the other.
    """

    def __init__(self, chosen_BS: Tensor, own_keys: bool = False):
        self.chosen_BS, self.own_keys = chosen_BS, own_keys
        self.B, self.S = chosen_BS.shape
        # Counted on the host, where many small operations cost less.
        self._index_n = np.flatnonzero(chosen_BS.cpu().numpy())
        self.count = len(self._index_n)
        # Where sequences are one token long, no token of a sequence follows another.
        self._fill = max(-self.count % ROW_BLOCK, MIN_ROWS - self.count) if self.S > 1 else 0
        self.index_1N = self._tensor(self._filled(self._index_n))[None]

    @property
    def is_empty(self) -> bool:
        """Whether no token takes the step."""
        return self.count == 0

    def mask(self, S: int) -> Tensor:
        """[B, S], True for the chosen tokens."""
        return self.chosen_BS

    def gather(self, x_BS: Tensor) -> Tensor:
        """The chosen tokens of ``x_BS``."""
        return self._one_row(x_BS).index_select(1, self.index_1N[0])  # Unlike ops.gather_tokens it may repeat a token.

    def gather_positions(self, table_BS: Tensor) -> Tensor:
        """What ``table_BS`` ([B or 1, S, ...]) has for the chosen tokens' positions."""
        return table_BS.index_select(1, self.index_1N[0] % self.S) if len(table_BS) == 1 else self.gather(table_BS)

    def add(self, x_BS: Tensor, update_1N: Tensor) -> Tensor:
        """``x_BS`` with ``update_1N`` added to the chosen tokens."""
        return ops.add_to_tokens(self._one_row(x_BS), *self._unfilled(self.index_1N, update_1N)).view(x_BS.shape)

    def add_weighted(
        self, y_BSD: Tensor, z_1ND: Tensor, weight_1N1: Tensor, alpha: float, phi_D: Tensor | None
    ) -> Tensor:
        """``y_BSD`` with ``(alpha * weight * z) * phi`` added to the chosen tokens (Eq. 4 and 6)."""
        index_1n, z_1nD, weight_1n = self._unfilled(self.index_1N, z_1ND, weight_1N1.squeeze(-1))
        return ops.add_weighted(self._one_row(y_BSD), index_1n, z_1nD, weight_1n, alpha, phi_D).view(y_BSD.shape)

    def replace(self, x_BS: Tensor, new_1N: Tensor) -> Tensor:
        """``x_BS`` with the chosen tokens replaced by ``new_1N``."""
        return ops.replace_tokens(self._one_row(x_BS), *self._unfilled(self.index_1N, new_1N)).view(x_BS.shape)

    def spread(self, x_1N: Tensor) -> Tensor:
        """[1, N, ...] to [R, C, ...]: each sequence in a row of its own, as attention needs them."""
        places = self.places
        if places.take_RC is not None:
            x_1N = x_1N.index_select(1, places.take_RC.flatten())
        return x_1N.view(*places.index_RC.shape, *x_1N.shape[2:])

    def collect(self, x_RC: Tensor) -> Tensor:
        """:meth:`spread`'s way back."""
        x_1P = self._one_row(x_RC)
        return x_1P if self.places.place_N is None else x_1P.index_select(1, self.places.place_N)

    def rows(self, x_B: Tensor) -> Tensor:
        """The sequences that :meth:`spread` has rows for, [R, ...]."""
        return x_B if self.places.row_R is None else x_B[self.places.row_R]

    @property
    def index_BK(self) -> Tensor:
        """Where among their keys the queries are that :meth:`spread` gives: [R, C], or [1, C] for keys of their own."""
        index_RC = self.places.index_RC
        return torch.arange(index_RC.shape[1], device=index_RC.device)[None] if self.own_keys else index_RC

    @property
    def spans(self) -> list[tuple[int, int]] | None:
        """See :class:`Places`."""
        return self.places.spans

    @cached_property
    def places(self) -> Places:
        """Where the tokens stand in attention: by blocks of positions, or for keys of their own one after another."""
        S, n = self.S, self.count
        if S == 1:
            return Places(torch.zeros_like(self.index_1N).view(n, 1), None if n == self.B else self.index_1N[0])
        block, width = (S, OWN_KEYS_BLOCK) if self.own_keys else (POSITION_BLOCK, ROW_BLOCK)
        blocks = -(-S // block)
        sequence_n, position_n = np.divmod(self._index_n, S)
        group_n = sequence_n * blocks + position_n // block
        count_BG = np.bincount(group_n, minlength=self.B * blocks).reshape(self.B, blocks)
        width_G = count_BG.max(0)
        width_G += -width_G % width
        count_B, C = count_BG.sum(1), int(width_G.sum())
        row_R, row_B = np.flatnonzero(count_B), np.cumsum(count_B > 0) - 1

        packed_n = np.arange(n)
        in_group_n = packed_n - _sum_before(count_BG.ravel())[group_n]
        place_n = row_B[sequence_n] * C + _sum_before(width_G)[position_n // block] + in_group_n
        take_RC = _sum_before(count_B)[row_R].repeat(C)
        take_RC[place_n] = packed_n
        valid_RC = np.zeros(len(take_RC), dtype=bool)
        valid_RC[place_n] = True
        if self.own_keys:
            spans = [(width, C - end) for end in range(width, C + 1, width)]
        else:
            spans = [(w, max(0, S - (g + 1) * block)) for g, w in enumerate(width_G.tolist()) if w]
        return Places(
            index_RC=self._tensor(position_n[take_RC]).view(-1, C),
            row_R=None if len(row_R) == self.B else self._tensor(row_R),
            take_RC=self._tensor(take_RC).view(-1, C),
            place_N=self._tensor(self._filled(place_n)),
            valid_RC=self._tensor(valid_RC).view(-1, C),
            spans=spans,
        )

    def _filled(self, x_n: np.ndarray) -> np.ndarray:
        """``x_n`` and its first element as often as rows are filled up."""
        return np.concatenate((x_n, x_n[:1].repeat(self._fill)))

    def _unfilled(self, *x_1N: Tensor) -> list[Tensor]:
        return [x[:, : self.count] for x in x_1N]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.chosen_BS.device)

    @staticmethod
    def _one_row(x_BS: Tensor) -> Tensor:
        return x_BS.reshape(1, -1, *x_BS.shape[2:])


def _sum_before(count: np.ndarray) -> np.ndarray:
    return np.cumsum(count) - count
