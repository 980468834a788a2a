"""Tokens that a run takes per domain, and how often it would have to repeat them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """One domain's part of a run."""

    tokens: float
    """What the run takes."""
    available: float
    """What the domain has for training."""

    @property
    def missing(self) -> float:
        """Tokens that would have to be repeats."""
        return max(self.tokens - self.available, 0.0)

    @property
    def epochs(self) -> float:
        """How often the run goes over the domain."""
        return self.tokens / self.available if self.available else float('inf')


def budgets(proportions: Mapping[str, float], training_tokens: Mapping[str, float], total: float) -> dict[str, Budget]:
    """Each domain's part of ``total`` tokens by its proportion."""
    return {name: Budget(share * total, training_tokens[name]) for name, share in proportions.items()}
