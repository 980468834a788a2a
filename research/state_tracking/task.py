"""Prefix products in S5, the permutations of five things.

The input is a sequence of three generators: a transposition, a 5-cycle and its inverse. The label at each position is
the product of the generators up to there, one of 120 permutations. Composing in a tree takes log2(S) layers; S5 is not
solvable, so a fixed number of layers does not suffice for any length (Barrington 1989; Merrill and Sabharwal 2023).

B sequences of S tokens.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

STATES = list(permutations(range(5)))
"""The permutations; p maps i to p[i]."""
GENERATORS = {'transposition': (1, 0, 2, 3, 4), 'cycle': (1, 2, 3, 4, 0), 'inverse': (4, 0, 1, 2, 3)}
IDENTITY = STATES.index((0, 1, 2, 3, 4))


def product_table() -> Tensor:
    """Return the index in ``STATES`` of p g, which maps i to p[g[i]], for each state p and generator g: [120, 3]."""
    index = {state: i for i, state in enumerate(STATES)}
    return torch.tensor([[index[tuple(p[i] for i in g)] for g in GENERATORS.values()] for p in STATES])


def sequences(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random inputs [B, S], which number the generators, and their labels [B, S], which number the states."""
    x_BS = torch.randint(len(GENERATORS), (count, length), generator=generator)
    table, state_B, labels = product_table(), torch.full((count,), IDENTITY), []
    for x_B in x_BS.T:
        state_B = table[state_B, x_B]
        labels.append(state_B)
    return x_BS, torch.stack(labels, dim=1)
