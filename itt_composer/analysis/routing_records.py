"""Which steps each token of some rows takes, and with which weights.

N rows, S sequence, M pairs of a layer and a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from itt_composer.model import ITTForCausalLM


@dataclass
class TokenThinking:
    """What the routers did with the tokens of N rows."""

    layer_steps: list[tuple[int, int]]
    """Layer and step, both counted from 1, in the order in which they run; Figure 7 writes (3, 2) as 3-2."""
    weight_MNS: np.ndarray
    """Router weights, float32."""
    chosen_MNS: np.ndarray
    """Whether the token took the step, bool."""
    threshold_M: np.ndarray
    """The score above which the ``threshold`` rule chooses, whatever the rule in force."""

    @property
    def depth_NS(self) -> np.ndarray:
        """How many of the M steps each token took."""
        return self.chosen_MNS.sum(0)


@torch.no_grad()
def token_thinking(model: ITTForCausalLM, rows_NS: Tensor, batch_size: int = 8) -> TokenThinking:
    """Run the model over the rows under the rule and the ratios in force, and say which tokens took which steps.

    Steps that are removed (a ratio of 0) are left out.

    Raises:
        ValueError: the model routes no tokens.
    """
    if model.selection is None:
        raise ValueError(f'the model routes no tokens (thinking: {model.config.thinking}), so every token is as deep')
    assert model.routing is not None
    records = []
    for rows_BS in rows_NS.to(model.device).split(batch_size):
        with model.routing.recording() as of_batch:
            model(rows_BS, logits_to_keep=1)
        records.append(of_batch)
    shape = -1, len(rows_NS), rows_NS.shape[1]
    by_step = list(zip(*records, strict=True))
    weights = [torch.cat([record.gate_BS for record in batches]) for batches in by_step]
    chosen = [torch.cat([record.routed_BS for record in batches]) for batches in by_step]
    return TokenThinking(
        layer_steps=[(record.layer + 1, record.step) for record in records[0]],
        weight_MNS=np.array([weight_NS.float().cpu().numpy() for weight_NS in weights]).reshape(shape),
        chosen_MNS=np.array([chosen_NS.cpu().numpy() for chosen_NS in chosen], dtype=bool).reshape(shape),
        threshold_M=np.array([float(record.threshold) for record in records[0]]),
    )
