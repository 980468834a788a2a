"""Which document each token of held-out sequences belongs to; intervals draw documents anew, whose tokens are alike.

N sequences of S tokens. The sequences of a domain follow one another, and a document goes on from one to the next.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor


def document_numbers(domains: Mapping[str, Tensor], bos: int | None) -> dict[str, np.ndarray]:
    """Each token's document, int64 [N, S] by domain, counted from 0 over all domains.

    Args:
        domains: consecutive sequences from the start of each domain's set, [N, S].
        bos: what each document begins with; None: a sequence counts as a document.
    """
    numbers, before = {}, 0
    for domain, rows_NS in domains.items():
        ids_NS = rows_NS.cpu().numpy()
        starts_NS = np.indices(ids_NS.shape)[1] == 0 if bos is None else ids_NS == bos
        starts_NS.flat[0] = True
        numbers[domain] = before + starts_NS.cumsum().reshape(ids_NS.shape) - 1
        before = int(numbers[domain].max()) + 1
    return numbers
