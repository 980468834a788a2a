"""The layers that think: ITT (Section 3) and Loop (Section 4.1).

B batch, S sequence, D hidden, T extra steps, K chosen tokens. Steps are numbered 1..T; step 0 is the first pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itt_composer.model import routing
from itt_composer.model.block import DecoderBlock, KeyValue, Rotation
from itt_composer.model.combine import combine_step
from itt_composer.model.config import ITTConfig
from itt_composer.model.routing import Selection
from itt_composer.thinking_options import token_count

# The running mean of the k-th largest score forgets over about this many forward passes.
THRESHOLD_WINDOW = 100


@dataclass
class RoutingRecord:
    """What the router of one step did in one forward pass: weights and choice of every token, [B, S] each."""

    step: int
    weight_BS: Tensor
    chosen_BS: Tensor
    threshold: Tensor


class LoopLayer(nn.Module):
    """f run N = T + 1 times on every token, nothing added: y = f(f(... f(x)))."""

    def __init__(self, config: ITTConfig, index: int):
        super().__init__()
        self.index = index
        self.T = config.thinking_options.steps
        self.f = DecoderBlock(config)

    def forward(self, x_BSD: Tensor, rotation: Rotation, padding_BS: Tensor | None = None) -> tuple[Tensor, KeyValue]:
        """[B, S, D] to [B, S, D], and the last pass's keys and values."""
        y_BSD, kv = self.f(x_BSD, rotation, padding_BS)
        for _ in range(self.T):
            y_BSD, kv = self.f(y_BSD, rotation, padding_BS)
        return y_BSD, kv


class ITTLayer(nn.Module):
    """The ITT layer::

        y0 = f(x)
        y  = y0 * phi[0]
        for t in 1..T:
            score     = router[t](y)
            weight    = sigmoid(score / temperature)
            chosen    = top k of score within each sequence
            z         = f(y[chosen])
            y[chosen] += (alpha[t] * weight[chosen] * z) * phi[t]

    Attributes:
        index: which of the decoder's layers this is, counted from 0.
        capacity_T: share of tokens that each step takes now; starts at ``token_ratios`` and may be set at any time.
        temperature: divides the scores; starts at ``router_temperature`` and may be set at any time.
        threshold_T: buffer, running mean over training of the k-th largest score of each step (``threshold`` rule).
            Zero, the 0.5 of a sigmoid router, before any training.
        records: a list to which each step appends a :class:`RoutingRecord`, or None not to record.
    """

    threshold_T: Tensor
    threshold_updates: Tensor

    def __init__(self, config: ITTConfig, index: int):
        super().__init__()
        self.index = index
        self.options = options = config.thinking_options
        T, D = options.steps, config.hidden_size
        self.f = DecoderBlock(config)
        self.phi_TD = nn.Parameter(torch.ones(T + 1, D)) if options.step_encoding else None
        self.router_TD = nn.Parameter(torch.zeros(T, D)) if options.token_routing else None
        self.register_buffer('threshold_T', torch.zeros(T))
        self.register_buffer('threshold_updates', torch.zeros((), dtype=torch.int64))
        assert options.token_ratios is not None
        self.capacity_T = list(options.token_ratios)
        self.temperature = float(config.router_temperature)
        self.records: list[RoutingRecord] | None = None

    def forward(self, x_BSD: Tensor, rotation: Rotation, padding_BS: Tensor | None = None) -> tuple[Tensor, KeyValue]:
        """[B, S, D] to [B, S, D], and the keys and values after the last step.

        Args:
            x_BSD: the tokens' states.
            rotation: rotary embedding at the tokens' positions.
            padding_BS: False where a token is padding, which is never chosen; None where there is none.
        """
        y_BSD, kv = self.f(x_BSD, rotation, padding_BS)
        if self.phi_TD is not None:
            y_BSD = (y_BSD * self.phi_TD[0]).to(y_BSD.dtype)
        kth_scores = []
        for t in range(1, self.options.steps + 1):
            if self.router_TD is None:
                y_BSD, kv = self._think(t, y_BSD, kv, rotation, padding_BS, None, y_BSD.new_ones(()), None)
                continue
            score_BS = self._score(y_BSD, t)
            chosen, kth_score = self._choose(score_BS, t, padding_BS)
            weight_BK1 = self._weigh(chosen.gather(score_BS))[..., None]
            unchosen_scale_BS1 = None
            if self.options.reweighting == 'symmetric':
                unchosen_scale_BS1 = 1 - self._weigh(score_BS)[..., None]
            y_BSD, kv = self._think(t, y_BSD, kv, rotation, padding_BS, chosen, weight_BK1, unchosen_scale_BS1)
            kth_scores.append(kth_score)
            if self.records is not None:
                self._record(t, score_BS, chosen)
        if self.training and kth_scores:
            self._update_thresholds(torch.stack(kth_scores))
        return y_BSD, kv

    def _think(
        self,
        t: int,
        y_BSD: Tensor,
        kv: KeyValue,
        rotation: Rotation,
        padding_BS: Tensor | None,
        chosen: Selection | None,
        weight_BK1: Tensor,
        unchosen_scale_BS1: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        """Step t: f on the chosen tokens (all, if None), and its result joined to the state."""
        own_keys_only = self.options.thinking_kv == 'chosen'
        y_BKD, rotation_BK = (y_BSD, rotation) if chosen is None else (chosen.gather(y_BSD), rotation.of(chosen))
        # Chosen tokens that see only one another are a sequence of their own, and none of them is padding.
        if own_keys_only and chosen is not None:
            padding_BS = None
        z_BKD, new_kv = self.f(y_BKD, rotation_BK, padding_BS, None if own_keys_only else kv, chosen)
        y_BSD = combine_step(
            self.options.combine,
            y_BSD,
            y_BKD,
            z_BKD,
            chosen,
            weight_BK1,
            self.options.alpha_T[t - 1],
            None if self.phi_TD is None else self.phi_TD[t],
            self.options.residual_thinking,
            unchosen_scale_BS1,
        )
        return y_BSD, kv if own_keys_only else new_kv

    def _score(self, y_BSD: Tensor, t: int) -> Tensor:
        """R^(t)(y), Eq. 5, in float32: a choice between tokens should not hang on bfloat16's eight bits."""
        assert self.router_TD is not None
        with torch.autocast(y_BSD.device.type, enabled=False):
            return F.linear(y_BSD.float(), self.router_TD[t - 1 : t].float()).squeeze(-1)

    def _weigh(self, score: Tensor) -> Tensor:
        return routing.weigh(score, self.options.weight_norm, self.temperature)

    @torch.no_grad()
    def _choose(self, score_BS: Tensor, t: int, padding_BS: Tensor | None) -> tuple[Selection, Tensor]:
        """The tokens of step t, and the k-th largest score, averaged over the sequences."""
        capacity, multiple = self.capacity_T[t - 1], self.options.token_multiple
        if padding_BS is None:
            ranked = routing.top_k(score_BS, token_count(capacity, score_BS.shape[1], multiple))
            kth_score = score_BS.gather(1, ranked.index_BK).amin(-1).mean()
        else:
            ranked = routing.top_k_padded(score_BS, capacity, padding_BS, multiple)
            kth_score = score_BS.masked_fill(~ranked.mask(score_BS.shape[1]), torch.inf).amin(-1).mean()
        if self.options.selection == 'top_p':
            return routing.top_p(score_BS / self.temperature, capacity, padding_BS, multiple), kth_score
        if self.options.selection == 'threshold':
            return routing.above_threshold(score_BS, self.threshold_T[t - 1], padding_BS, multiple), kth_score
        return ranked, kth_score

    @torch.no_grad()
    def _update_thresholds(self, kth_score_T: Tensor) -> None:
        """Plain mean over the first passes, then an exponential one: no start-up bias to correct."""
        self.threshold_updates += 1
        rate = 1 / self.threshold_updates.clamp(max=THRESHOLD_WINDOW)
        self.threshold_T.lerp_(kth_score_T.to(self.threshold_T.dtype), rate.to(self.threshold_T.dtype))

    @torch.no_grad()
    def _record(self, t: int, score_BS: Tensor, chosen: Selection) -> None:
        assert self.records is not None
        chosen_BS = chosen.mask(score_BS.shape[1])
        self.records.append(RoutingRecord(t, self._weigh(score_BS), chosen_BS, self.threshold_T[t - 1].clone()))


def thinking_layers(module: nn.Module) -> dict[int, ITTLayer]:
    """The ITT layers of a model by their index, counted from 0; sees through DDP, FSDP and compile wrappers."""
    return {layer.index: layer for layer in module.modules() if isinstance(layer, ITTLayer)}
