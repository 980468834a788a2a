"""AdamW with decoupled weight decay in PyTorch's fused kernel: LLM-Foundry's ``fused_decoupled_adamw``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import composer.optim
import torch


class DecoupledAdamW(composer.optim.DecoupledAdamW):
    """Composer's ``DecoupledAdamW`` with one kernel for all parameters of a group, and no wait for the device.

    Weights, hyperparameters and state are Composer's; its step is a loop over the parameters, with ``.item()`` in each.
    The weights are multiplied by ``1 - weight_decay * lr / initial_lr``, where ``initial_lr`` is the highest rate of
    the schedule. Where that is 0 nothing changes. A checkpoint finds an optimizer's state by the name of its class,
    which is Composer's here, so that a state of Composer's is found.

    Args:
        params: parameters, or groups of them.
        **options: ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``amsgrad`` of Composer's.
    """

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        for group in (self.defaults, *self.param_groups):
            group['fused'] = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also one of Composer's: the fused kernel needs the step counts on the device."""
        groups = [{**group, 'fused': True} for group in state_dict['param_groups']]
        super().load_state_dict({**state_dict, 'param_groups': groups})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group['weight_decay'] for group in self.param_groups]
        for group in self.param_groups:
            # PyTorch's AdamW multiplies by 1 - weight_decay * lr.
            if group['initial_lr']:
                group['weight_decay'] /= group['initial_lr']
        try:
            torch.optim.AdamW.step(self)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group['weight_decay'] = decay
        return loss
