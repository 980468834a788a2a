"""Query-key pairs of routed attention: those of the positions really routed, and those of an even spread.

A routed token attends to the keys up to its own position, so early tokens cost less than late ones. The exact FLOPs of
a model assume an even spread; here they are corrected.
"""

from __future__ import annotations

from typing import NamedTuple

from itt_composer.flops import Decoder
from itt_composer.model.routing_state import RoutingRecord


class RoutedPairs(NamedTuple):
    """Pairs of all extra steps of a forward pass, mean per sequence."""

    routed: float
    even: float

    @classmethod
    def of(cls, records: list[RoutingRecord], thinking_kv: str) -> RoutedPairs:
        """Count the pairs of the steps that were recorded, one per step and thinking layer."""
        routed = even = 0.0
        for record in records:
            B, S = record.routed_BS.shape
            k = int(record.routed_BS.sum()) / B
            if thinking_kv == 'routed_only':  # Which keys a query sees does not depend on where it stands.
                seen = spread = k * (k + 1) / 2
            else:
                seen = int((record.routed_BS.nonzero()[:, 1] + 1).sum()) / B
                spread = k * (S + 1) / 2
            routed, even = routed + seen, even + spread
        return cls(routed, even)

    def more_flops(self, decoder: Decoder) -> float:
        """Return what a forward pass of one sequence costs more than with an even spread; negative for less."""
        return 4 * (self.routed - self.even) * decoder.q_size
