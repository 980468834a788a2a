"""The layers that think: ITT (Section 3) and Loop (Section 4.1).

B batch, S sequence, D hidden, T extra steps, K chosen tokens. Steps are numbered 1..T; step 0 is the first pass.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itt_composer import ops
from itt_composer.model import routing
from itt_composer.model.block import DecoderBlock, KeyValue, Rotation
from itt_composer.model.cache import PassCache
from itt_composer.model.combine import combine_step
from itt_composer.model.config import ITTConfig
from itt_composer.model.precision import autocast_dtype
from itt_composer.model.selection import PackedSelection, Selection
from itt_composer.model.thresholds import ThresholdModule, sum_and_count
from itt_composer.options import token_count


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

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, padding_BS: Tensor | None = None, kept: PassCache | None = None
    ) -> tuple[Tensor, KeyValue]:
        """[B, S, D] to [B, S, D], and the last pass's keys and values; arguments as in :class:`ITTLayer`."""
        y_BSD, kv = self.f(x_BSD, rotation, padding_BS, kept=kept)
        for t in range(1, self.T + 1):
            y_BSD, kv = self.f(y_BSD, rotation, padding_BS, kept=kept and kept.at(t))
        return y_BSD, kv


class ITTLayer(ThresholdModule):
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
        asked_T: shares that take the place of ``capacity_T`` outside training, or None.
        temperature: divides the scores; starts at ``router_temperature`` and may be set at any time.
        evaluation_selection: the rule outside training; starts at the option's value and may be set at any time.
        calibrated_T: thresholds that take the place of ``threshold_T`` in evaluation, or None.
        records: a list to which each step appends a :class:`RoutingRecord`, or None not to record.
    """

    def __init__(self, config: ITTConfig, index: int):
        super().__init__(config.thinking_options.steps)
        self.index = index
        self.options = options = config.thinking_options
        T, D = options.steps, config.hidden_size
        self.f = DecoderBlock(config)
        self.phi_TD = nn.Parameter(torch.ones(T + 1, D)) if options.step_encoding else None
        self.router_TD = nn.Parameter(torch.zeros(T, D)) if options.token_routing else None
        assert options.token_ratios is not None
        self.capacity_T = list(options.token_ratios)
        self.asked_T: list[float] | None = None
        self.temperature = float(config.router_temperature)
        self.evaluation_selection = options.evaluation_selection
        self.calibrated_T: list[float] | None = None
        self.records: list[RoutingRecord] | None = None

    @property
    def selection(self) -> str:
        """The rule in force: ``selection`` in training mode, ``evaluation_selection`` outside."""
        return self.options.selection if self.training else self.evaluation_selection

    @property
    def ratios_T(self) -> list[float]:
        """The share of tokens in force for each step."""
        return self.capacity_T if self.training or self.asked_T is None else self.asked_T

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, padding_BS: Tensor | None = None, kept: PassCache | None = None
    ) -> tuple[Tensor, KeyValue]:
        """[B, S, D] to [B, S, D], and these tokens' keys and values after the last step.

        Args:
            x_BSD: the tokens' states.
            rotation: rotary embedding at the tokens' positions.
            padding_BS: False where a token is padding, which is never chosen; None where there is none. With ``kept``
                it covers the tokens of the earlier calls too.
            kept: the layer's keys and values of earlier calls, to which these tokens' are added.
        """
        # A frozen router keeps its thresholds, which an adapter trained around it would not carry.
        updates = self.training and self.router_TD is not None and self.router_TD.requires_grad
        if updates:
            assert self.router_TD is not None
            self.commit_if_stepped(self.router_TD)
        elif not self.training:
            self.commit_thresholds()
        y_BSD, kv = self.first_pass(x_BSD, rotation, padding_BS, kept)
        seen = []
        for t in self.steps():
            y_BSD, kv, lowest_B = self.step(t, y_BSD, kv, rotation, padding_BS, kept)
            if lowest_B is not None:
                seen.append(sum_and_count(lowest_B.detach()))
        if updates:
            self.seen_T2 = torch.stack(seen)
        return y_BSD, kv

    def steps(self) -> list[int]:
        """The steps that are taken, of 1..T; outside training a ratio of 0 removes one."""
        return [t for t in range(1, self.options.steps + 1) if self.training or self.ratios_T[t - 1] > 0]

    def first_pass(
        self, x_BSD: Tensor, rotation: Rotation, padding_BS: Tensor | None = None, kept: PassCache | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Step 0: y0 * phi[0], and the keys and values of every token."""
        y_BSD, kv = self.f(x_BSD, rotation, padding_BS, kept=kept)
        return y_BSD if self.phi_TD is None else (y_BSD * self.phi_TD[0]).to(y_BSD.dtype), kv

    def step(
        self,
        t: int,
        y_BSD: Tensor,
        kv: KeyValue,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        kept: PassCache | None = None,
    ) -> tuple[Tensor, KeyValue, Tensor | None]:
        """Step t: the states and the keys and values after it, and in training each sequence's lowest routed score."""
        kept = kept and kept.at(t)
        if self.router_TD is None:
            one = y_BSD.new_ones(())
            return *self._think(t, y_BSD, kv, rotation, padding_BS, kept, None, one, None), None
        score_BS = self.score(y_BSD, t)
        chosen, lowest_score = self._choose(score_BS, t, padding_BS)
        if self.records is not None:
            self._record(t, score_BS, chosen)
        symmetric = self.options.reweighting == 'symmetric'
        if chosen is not None and chosen.is_empty and self.options.combine != 'equation7' and not symmetric:
            return y_BSD, kv, lowest_score
        # Weighed before they are gathered: vectorised functions and their last few elements differ in the last bit, and
        # which tokens are the last few must not depend on how many were chosen.
        weight_BS = self._weigh(score_BS)
        weight_BK1 = (weight_BS if chosen is None else chosen.gather(weight_BS))[..., None]
        unchosen_scale_BS1 = 1 - weight_BS[..., None] if symmetric else None
        y_BSD, kv = self._think(t, y_BSD, kv, rotation, padding_BS, kept, chosen, weight_BK1, unchosen_scale_BS1)
        return y_BSD, kv, lowest_score

    def _think(
        self,
        t: int,
        y_BSD: Tensor,
        kv: KeyValue,
        rotation: Rotation,
        padding_BS: Tensor | None,
        kept: PassCache | None,
        chosen: Selection | PackedSelection | None,
        weight_BK1: Tensor,
        unchosen_scale_BS1: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        """Step t: f on the chosen tokens (all, if None), and its result joined to the state."""
        own_keys_only = self.options.thinking_kv == 'routed_only'
        # Chosen tokens that see only one another are a sequence of their own, and none of them is padding.
        if own_keys_only and self.router_TD is not None:
            padding_BS = None
        y_BKD = y_BSD if chosen is None else chosen.gather(y_BSD)
        if chosen is not None and chosen.is_empty:
            z_BKD, new_kv = y_BKD, kv
        else:
            rotation_BK = rotation if chosen is None else rotation.of(chosen)
            with ops.any_number_of_rows(isinstance(chosen, PackedSelection) and chosen.S > 1):
                z_BKD, new_kv = self.f(y_BKD, rotation_BK, padding_BS, None if own_keys_only else kv, chosen, kept)
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

    def score(self, y_BSD: Tensor, t: int) -> Tensor:
        """R^(t)(y), Eq. 5, [B, S] in float32: a choice between tokens should not hang on bfloat16's eight bits."""
        assert self.router_TD is not None
        device = y_BSD.device.type
        with torch.autocast(device, enabled=False) if autocast_dtype(device) else nullcontext():
            return F.linear(y_BSD.float(), self.router_TD[t - 1 : t].float()).squeeze(-1)

    def _weigh(self, score: Tensor) -> Tensor:
        return routing.weigh(score, self.options.weight_norm, self.temperature)

    @torch.no_grad()
    def _choose(
        self, score_BS: Tensor, t: int, padding_BS: Tensor | None
    ) -> tuple[Selection | PackedSelection | None, Tensor | None]:
        """The tokens of step t, None for all; in training also ranking's lowest routed score, [B]."""
        S, by_threshold = score_BS.shape[1], self.selection == 'threshold'
        if padding_BS is not None:
            padding_BS = padding_BS[:, -S:]
        if self.training:
            ranked = self._rank(score_BS, t, padding_BS)
            lowest_score = routing.lowest_chosen(score_BS, ranked)
            if not by_threshold:
                return ranked, lowest_score
            chosen_BS = self._above_threshold(score_BS, t, padding_BS)
            return Selection.from_mask(chosen_BS, self.options.token_multiple), lowest_score
        if by_threshold:
            chosen_BS = self._above_threshold(score_BS, t, padding_BS)
        else:
            chosen_BS = self._rank(score_BS, t, padding_BS).mask(S)
        if S == 1 and chosen_BS.all():  # In decoding most often; longer texts must not have two ways to one result.
            return None, None
        return PackedSelection(chosen_BS, own_keys=self.options.thinking_kv == 'routed_only'), None

    def _above_threshold(self, score_BS: Tensor, t: int, padding_BS: Tensor | None) -> Tensor:
        """[B, S]; a ratio of 1 routes every token, whatever the threshold."""
        threshold = self.threshold(t) if self.ratios_T[t - 1] < 1 else -math.inf
        return routing.above_threshold(score_BS, threshold, padding_BS)

    def _rank(self, score_BS: Tensor, t: int, padding_BS: Tensor | None) -> Selection:
        """Step t's share of the tokens by ``top_k``, or by ``top_p`` where that is the rule."""
        ratio, multiple = self.ratios_T[t - 1], self.options.token_multiple
        if self.selection == 'top_p':
            return Selection.from_mask(routing.top_p(score_BS / self.temperature, ratio, padding_BS), multiple)
        if padding_BS is None:
            return Selection(routing.top_k(score_BS, token_count(ratio, score_BS.shape[1], multiple)))
        return Selection.from_mask(routing.top_k_padded(score_BS, ratio, padding_BS, multiple), multiple)

    def threshold(self, t: int) -> Tensor | float:
        """Step t's threshold in force: the calibrated one outside training, where there is one."""
        if self.calibrated_T is not None and not self.training:
            return self.calibrated_T[t - 1]
        return self.threshold_T[t - 1]

    @torch.no_grad()
    def _record(self, t: int, score_BS: Tensor, chosen: Selection | PackedSelection | None) -> None:
        assert self.records is not None
        chosen_BS = torch.ones_like(score_BS, dtype=torch.bool) if chosen is None else chosen.mask(score_BS.shape[1])
        threshold = torch.as_tensor(self.threshold(t), device=score_BS.device).clone()
        self.records.append(RoutingRecord(t, self._weigh(score_BS), chosen_BS, threshold))


def thinking_layers(module: nn.Module) -> dict[int, ITTLayer]:
    """The ITT layers of a model by their index, counted from 0; sees through DDP, FSDP and compile wrappers."""
    return {layer.index: layer for layer in module.modules() if isinstance(layer, ITTLayer)}
