"""The thresholds of threshold routing (``selection: threshold``), which is causal.

A token is routed to step t where its own score exceeds the threshold of that layer and step. The threshold is the
running mean, over batches, of the lowest score that top-k routing (top-p, where ``selection`` says so) would route in a
sequence. Within a batch it is frozen: each training forward pass adds to a pending sum and count, and one commit per
optimizer step moves it. So neither the number of ranks nor the microbatch size changes what is routed.

Who commits: the Composer callback ``threshold_commit`` at the end of a batch; in any other loop the layer itself, when
it sees that the optimizer has changed its router (another parameter, where the router is frozen), at an evaluation, and
before its state is saved. (Not when it leaves training mode: Composer does so between the microbatches of a batch.)

B batch, T extra steps, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The running mean forgets over about this many batches.
THRESHOLD_WINDOW = 100


class ThresholdModule(nn.Module):
    """A layer with one threshold per extra step.

    Attributes:
        threshold_T: buffer; zero, the 0.5 of a sigmoid router, before any training. Float32 whatever the model's dtype.
        threshold_updates: buffer, the number of batches that the thresholds come from.
        seen_T2: sum and count of the lowest routed scores of the last training forward pass, or None.
    """

    threshold_T: Tensor
    threshold_updates: Tensor

    def __init__(self, steps: int):
        super().__init__()
        self.register_buffer('threshold_T', torch.zeros(steps, dtype=torch.float32))
        self.register_buffer('threshold_updates', torch.zeros((), dtype=torch.int64))
        self.seen_T2: Tensor | None = None
        self._pending_T2: Tensor | None = None
        self._trained_then: Tensor | None = None
        self.register_state_dict_pre_hook(_commit_before_saving)

    @torch.no_grad()
    def commit_if_stepped(self, trained: Tensor) -> None:
        """Commit where ``trained`` is no longer what it was at the last training forward pass; no device sync."""
        trained, then = trained.detach(), self._trained_then
        if self._pending_T2 is not None and then is not None and then.shape == trained.shape:
            stepped = (trained != then).any()
            self._move_thresholds(self._pending_T2 * stepped)
            self._pending_T2 = self._pending_T2 * ~stepped
        self._trained_then = trained.clone()

    @torch.no_grad()
    def commit_thresholds(self) -> None:
        """Move the thresholds by what the forward passes since the last commit have seen, if there were any."""
        if self._pending_T2 is not None:
            self._move_thresholds(self._pending_T2)
            self._pending_T2 = None

    def discard_pending(self) -> None:
        """Forget what the forward passes since the last commit have seen."""
        self.seen_T2 = self._pending_T2 = None

    def _move_thresholds(self, pending_T2: Tensor) -> None:
        """The plain mean over the first batches, then an exponential one: no start-up bias to correct.

        Raises:
            ValueError: a wrapper has cast the thresholds to another type, in which small updates would be lost.
        """
        if self.threshold_T.dtype != torch.float32:
            raise ValueError(
                f'model: the routing thresholds must be float32, got {self.threshold_T.dtype}; under FSDP set '
                'fsdp_config.mixed_precision: {param_dtype: bf16, reduce_dtype: fp32, buffer_dtype: fp32}'
            )
        sum_T, count_T = pending_T2.unbind(-1)
        moves_T = count_T > 0
        mean_T = sum_T / count_T.clamp(min=1)
        self.threshold_updates += moves_T.any()
        rate = 1 / self.threshold_updates.clamp(1, THRESHOLD_WINDOW).float()
        self.threshold_T.copy_(torch.where(moves_T, self.threshold_T.lerp(mean_T, rate), self.threshold_T))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ThresholdModule:
        """``.to()`` and its kin, which leave the thresholds in float32 as the scores are."""
        self.commit_thresholds()
        before = self.threshold_T
        super()._apply(fn, recurse)
        if self.threshold_T.dtype != torch.float32 and not before.is_meta:
            self.threshold_T = before.to(self.threshold_T.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._pending_T2 = None  # It belongs to the weights that are replaced.
        super()._load_from_state_dict(*args, **kwargs)


def _commit_before_saving(module: ThresholdModule, prefix: str, keep_vars: bool) -> None:
    module.commit_thresholds()


def sum_and_count(lowest_B: Tensor) -> Tensor:
    """[2]: the sum of the finite ones and their count; a sequence of padding, or one that overflowed, has none."""
    finite_B = lowest_B.isfinite()
    return torch.stack([torch.where(finite_B, lowest_B, 0).float().sum(), finite_B.sum().float()])


@torch.no_grad()
@torch.compiler.disable
def accumulate_seen(layers: Sequence[ThresholdModule]) -> None:
    """Add what a training forward pass has seen to each layer's pending sum.

    Ranks are summed here, so that every commit is local. They must run the same number of training forward passes.
    """
    seen = [(layer, layer.seen_T2) for layer in layers if layer.seen_T2 is not None]
    if not seen:
        return
    seen_LT2 = torch.stack([seen_T2.to(seen[0][1].device) for _, seen_T2 in seen])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(seen_LT2)
    for (layer, _), seen_T2 in zip(seen, seen_LT2, strict=True):
        seen_T2 = seen_T2.to(layer.threshold_T.device)
        layer._pending_T2 = seen_T2 if layer._pending_T2 is None else layer._pending_T2 + seen_T2
        layer.seen_T2 = None
