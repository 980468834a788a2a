"""Each sequence counts once in an evaluation on several ranks.

streaming gives each rank equally many sequences, and repeats up to one less than there are ranks for it. Here the
labels of the repeated ones are left out, so that the loss is that of one rank.
"""

from __future__ import annotations

import numpy as np
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.partition import get_partitions

from itt_composer.model.loss import IGNORED


class EvaluateOnce(Callback):
    """Takes the labels out of sequences that an earlier rank, or this one, has evaluated already."""

    def __init__(self) -> None:
        self._repeated = np.empty(0, bool)

    def eval_start(self, state: State, logger: Logger) -> None:
        """See which of this rank's sequences are repeated."""
        dataset = getattr(state.dataloader, 'dataset', None)
        self._repeated = np.empty(0, bool)
        if isinstance(dataset, StreamingDataset) and dist.get_world_size() > 1:
            nodes, ranks = dist.get_world_size() // dist.get_local_world_size(), dist.get_local_world_size()
            # streaming's own number, which it sets when it is first iterated.
            default = 64 * nodes if dataset.shuffle_algo in ('py1s', 'py2s') else nodes
            canonical = dataset.num_canonical_nodes or default
            again = repeated(dataset.partition_algo, dataset.epoch_size, canonical, nodes, ranks)
            self._repeated = again[dist.get_node_rank(), dist.get_local_rank()]

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Leave them out of the loss."""
        if 'labels' in state.batch:
            labels = state.batch['labels']
            now, self._repeated = self._repeated[: len(labels)], self._repeated[len(labels) :]
            for row in np.flatnonzero(now):
                labels[row] = IGNORED


def repeated(algorithm: str, sequences: int, canonical_nodes: int, nodes: int, ranks: int) -> np.ndarray:
    """Bool, [nodes, ranks, sequences of a rank]: whether streaming has given the sequence out before."""
    ids = get_partitions(algorithm, sequences, canonical_nodes, nodes, ranks, 1, 1).reshape(nodes, ranks, -1)
    in_order = ids.transpose(2, 0, 1)
    again = np.ones(in_order.size, bool)
    again[np.unique(in_order.ravel(), return_index=True)[1]] = False
    return again.reshape(in_order.shape).transpose(1, 2, 0)
