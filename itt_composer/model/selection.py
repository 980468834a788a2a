"""The tokens that one extra step processes, and how they are taken out of the sequences and put back.

B batch, S sequence, R sequences that have routed tokens, K routed tokens of each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from itt_composer import ops
from itt_composer.options import round_up


def exporting() -> bool:
    """Whether ``torch.export`` traces the model. ``is_exporting`` alone is True within ``torch.compile`` as well."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


@dataclass
class Selection:
    """The routed tokens of each sequence, of which sequences may have different numbers."""

    shape: tuple[int, int]
    """B and S of the sequences that they are of."""
    index_RK: Tensor
    """Positions in the sequence: unique within a row, the routed tokens first and ascending."""
    valid_RK: Tensor | None = None
    """False where a sequence has fewer than K: another of its tokens stands there, and its results are dropped. None:
    all have K."""
    sequence_R: Tensor | None = None
    """Which sequences they are of; None: all, as always in training."""

    @classmethod
    @torch.compiler.disable
    def from_mask(cls, routed_BS: Tensor, token_multiple: int = 1, training: bool = False) -> Selection:
        """The tokens where ``routed_BS`` ([B, S]) is True. Waits for the device, and so
        stands outside what ``torch.compile`` compiles.

        K is the largest number of a sequence. In training it is at least one, so that every parameter takes part, and
        rounded up to ``token_multiple``; in evaluation sequences without routed tokens are left out.
        """
        B, S = routed_BS.shape
        if S == 1 and not training:
            some_R = [b for b, routed in enumerate(routed_BS.view(B).tolist()) if routed]
            R, device = len(some_R), routed_BS.device
            index_RK = torch.zeros(R or B, 1 if R else 0, dtype=torch.int64, device=device)
            return cls((B, S), index_RK, None, torch.tensor(some_R, device=device) if 0 < R < B else None)
        count_B = routed_BS.sum(-1).tolist()
        K, sequence_R = max(count_B), None
        if training:
            K = round_up(max(1, K), token_multiple, S)
        elif 0 in count_B and K > 0:
            sequence_R = torch.tensor([b for b, n in enumerate(count_B) if n], device=routed_BS.device)
            routed_BS = routed_BS[sequence_R]
        index_RK = (~routed_BS).to(torch.uint8).argsort(dim=-1, stable=True)[:, :K]
        full = all(n == K for n in count_B if n or sequence_R is None)
        return cls((B, S), index_RK, None if full else routed_BS.gather(1, index_RK), sequence_R)

    @classmethod
    def of_any_number(cls, routed_BS: Tensor) -> Selection:
        """The same with K = S, so that no shape depends on how many are routed: for graphs that are exported."""
        B, S = routed_BS.shape
        index_BS = (~routed_BS).to(torch.uint8).argsort(dim=-1, stable=True)
        return cls((B, S), index_BS, routed_BS.gather(1, index_BS))

    @property
    def is_empty(self) -> bool:
        """Whether no token is routed."""
        return self.index_RK.shape[1] == 0

    @property
    def is_all(self) -> bool:
        """Whether every token is routed."""
        return self.valid_RK is None and self.sequence_R is None and self.index_RK.shape[1] == self.shape[1]

    def mask(self) -> Tensor:
        """[B, S], True for the routed tokens."""
        valid_RK = torch.ones_like(self.index_RK, dtype=torch.bool) if self.valid_RK is None else self.valid_RK
        mask_BS = torch.zeros(self.shape, dtype=torch.bool, device=valid_RK.device)
        return self._rows(mask_BS, lambda mask_RS: mask_RS.scatter(1, self.index_RK, valid_RK))

    def sequences(self, x_B: Tensor) -> Tensor:
        """The sequences that have routed tokens, [R, ...]."""
        return x_B if self.sequence_R is None else x_B.index_select(0, self.sequence_R)

    def gather(self, x_BS: Tensor) -> Tensor:
        """The routed tokens, [R, K, ...]."""
        return ops.gather_tokens(self.sequences(x_BS), self.index_RK)

    def gather_positions(self, table_BS: Tensor) -> Tensor:
        """What ``table_BS`` ([B or 1, S, ...]) has for the routed tokens' positions."""
        if len(table_BS) > 1:
            return self.gather(table_BS)
        return table_BS[0].index_select(0, self.index_RK.flatten()).unflatten(0, self.index_RK.shape)

    def add(self, x_BS: Tensor, update_RK: Tensor) -> Tensor:
        """``x_BS`` with ``update_RK`` added to the routed tokens."""
        if self.valid_RK is not None:
            update_RK = torch.where(self._valid_like(update_RK), update_RK, 0)
        return self._rows(x_BS, lambda x_RS: ops.add_to_tokens(x_RS, self.index_RK, update_RK))

    def add_weighted(
        self, y_BSD: Tensor, z_RKD: Tensor, gate_RK1: Tensor, alpha: float, phi_D: Tensor | None
    ) -> Tensor:
        """``y_BSD`` with ``(alpha * gate * z) * phi`` added to the routed tokens (Eq. 4 and 6)."""
        gate_RK = gate_RK1.squeeze(-1)
        if self.valid_RK is not None:
            gate_RK = torch.where(self.valid_RK, gate_RK, 0)
        return self._rows(y_BSD, lambda y_RSD: ops.add_weighted(y_RSD, self.index_RK, z_RKD, gate_RK, alpha, phi_D))

    def replace(self, x_BS: Tensor, new_RK: Tensor) -> Tensor:
        """``x_BS`` with the routed tokens replaced by ``new_RK``."""
        if self.valid_RK is not None:
            new_RK = torch.where(self._valid_like(new_RK), new_RK, self.gather(x_BS))
        return self._rows(x_BS, lambda x_RS: ops.replace_tokens(x_RS, self.index_RK, new_RK))

    def _rows(self, x_B: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``x_B`` with ``function`` done to the sequences that have routed tokens."""
        if self.sequence_R is None:
            return function(x_B)
        return x_B.index_copy(0, self.sequence_R, function(self.sequences(x_B)))

    def _valid_like(self, x_RK: Tensor) -> Tensor:
        assert self.valid_RK is not None
        return self.valid_RK.view(*self.valid_RK.shape, *[1] * (x_RK.dim() - 2))
