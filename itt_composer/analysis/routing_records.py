"""The steps that each token of some sequences is routed to, and its gate values.

N sequences of S tokens, M pairs of a layer and a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from itt_composer.model import ITTForCausalLM


@dataclass
class TokenThinking:
    """What the routers did with the tokens of N sequences."""

    layer_steps: list[tuple[int, int]]
    """Layer (from 0) and step (from 1), in the order in which they run; Figure 7 writes (2, 2) as 3-2."""
    gate_MNS: np.ndarray
    """Gate values, float32."""
    routed_MNS: np.ndarray
    """Whether the token was routed to the step, bool."""
    threshold_M: np.ndarray
    """The score above which threshold routing routes a token, whatever the active selection."""

    @property
    def depth_NS(self) -> np.ndarray:
        """Number of the M steps that each token was routed to."""
        return self.routed_MNS.sum(0)


@torch.no_grad()
def token_thinking(model: ITTForCausalLM, rows_NS: Tensor, batch_size: int = 8) -> TokenThinking:
    """Run the model with its active selection and ratios, and return which tokens were routed to which steps.

    Steps with a ratio of 0 are left out.

    Raises:
        ValueError: the model routes no tokens.
    """
    if model.selection is None:
        raise ValueError(f'the model routes no tokens (thinking: {model.config.thinking}); use one with thinking: itt')
    assert model.routing is not None
    records = []
    for rows_BS in rows_NS.to(model.device).split(batch_size):
        with model.routing.recording() as of_batch:
            model(rows_BS, logits_to_keep=1)
        records.append(of_batch)
    shape = -1, len(rows_NS), rows_NS.shape[1]
    by_step = list(zip(*records, strict=True))
    gates = [torch.cat([record.gate_BS for record in batches]) for batches in by_step]
    routed = [torch.cat([record.routed_BS for record in batches]) for batches in by_step]
    return TokenThinking(
        layer_steps=[(record.layer, record.step) for record in records[0]],
        gate_MNS=np.array([gate_NS.float().cpu().numpy() for gate_NS in gates]).reshape(shape),
        routed_MNS=np.array([routed_NS.cpu().numpy() for routed_NS in routed], dtype=bool).reshape(shape),
        threshold_M=np.array([float(record.threshold) for record in records[0]]),
    )
