"""The thinking layers: ITT (Section 3) and Loop (Section 4.1).

B batch, S sequence, D hidden, T extra steps, R sequences that have routed tokens, K routed tokens of each of them.
Steps are numbered 1..T; step 0 is the base pass.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itt_composer.model import routing
from itt_composer.model.adapters import add_to_adapters, take_from_adapters
from itt_composer.model.block import Trace
from itt_composer.model.blocks import BlockKeyValue, thinking_block
from itt_composer.model.cache import PassCache
from itt_composer.model.combine import combine_step
from itt_composer.model.config import ITTConfig
from itt_composer.model.legacy import rename_loaded_weights
from itt_composer.model.rotary import Rotation
from itt_composer.model.routing_state import RoutingRecord, RoutingState
from itt_composer.model.selection import Selection
from itt_composer.model.thresholds import ThresholdModule, sum_and_count
from itt_composer.ops.precision import autocast_dtype


class LoopLayer(nn.Module):
    """The block run N = T + 1 times on every token, nothing added: y = block(block(... block(x)))."""

    def __init__(self, config: ITTConfig, index: int):
        super().__init__()
        self.index = index
        self.T = config.thinking_options.steps
        self.block = thinking_block(config, index)
        self.register_load_state_dict_pre_hook(rename_loaded_weights)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        cache: PassCache | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, BlockKeyValue]:
        """[B, S, D] to [B, S, D], and the last pass's keys and values; arguments as in :class:`ITTLayer`."""
        y_BSD, kv = self.block(x_BSD, rotation, padding_BS, cache=cache, trace=trace)
        for t in range(1, self.T + 1):
            y_BSD, kv = self.block(y_BSD, rotation, padding_BS, cache=cache and cache.at(t))
        return y_BSD, kv


class StepResult(NamedTuple):
    """The result of an extra step."""

    y_BSD: Tensor
    kv: BlockKeyValue
    lowest_B: Tensor | None
    """In training, the lowest score among each sequence's top k."""


class ITTLayer(ThresholdModule):
    """The ITT layer::

        y0 = block(x)
        y  = y0 * phi[0]
        for t in 1..T:
            score     = router[t](y)
            gate      = sigmoid(score / temperature)
            routed    = top k of score within each sequence
            z         = block(y[routed])
            y[routed] += (alpha[t] * gate[routed] * z) * phi[t]

    Args:
        config: the model's.
        index: which of the decoder's layers this is, counted from 0.
        routing: how tokens are routed; shared by the layers of a model.
    """

    def __init__(self, config: ITTConfig, index: int, routing: RoutingState):
        super().__init__(config.thinking_options.steps)
        self.index = index
        self.routing = routing
        self.options = options = config.thinking_options
        T, D = options.steps, config.hidden_size
        self.block = thinking_block(config, index)
        self.phi_TD = nn.Parameter(torch.ones(T + 1, D)) if options.step_encoding else None
        self.router_TD = nn.Parameter(torch.zeros(T, D)) if options.token_routing else None
        self.register_state_dict_post_hook(add_to_adapters)
        self.register_load_state_dict_pre_hook(take_from_adapters)
        self.register_load_state_dict_pre_hook(rename_loaded_weights)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        cache: PassCache | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, BlockKeyValue]:
        """[B, S, D] to [B, S, D], and these tokens' keys and values after the last step.

        Args:
            x_BSD: the tokens' hidden states.
            rotation: rotary embedding at the tokens' positions.
            padding_BS: False where a token is padding, which is never routed; None: no padding. With ``cache`` it
                covers the tokens of the earlier calls too.
            cache: the layer's keys and values of earlier calls, to which these tokens' are added.
            trace: what to show of the base pass; None: nothing.
        """
        # Generation in training mode decodes token by token, and the lowest score of one token says nothing.
        generating = cache is not None and not torch.is_grad_enabled()
        trained = self._trained() if self.training and not generating else None
        if trained is not None:
            self.commit_if_stepped(trained)
        elif not self.training:
            self.commit_thresholds()
        y_BSD, kv = self.base_pass(x_BSD, rotation, padding_BS, cache, trace)
        seen = []
        for t in self.routing.steps(self.training):
            y_BSD, kv, lowest_B = self.step(t, y_BSD, kv, rotation, padding_BS, cache)
            if lowest_B is not None:
                seen.append(sum_and_count(lowest_B.detach()))
        if trained is not None:
            self.seen_T2 = torch.stack(seen)
        return y_BSD, kv

    def _trained(self) -> Tensor | None:
        """The parameter by whose change the layer sees an optimizer step; None where its thresholds stay.

        The router, or the smallest trainable one where the router is frozen: thresholds follow the hidden states, which
        an adapter changes too. A frozen layer keeps its thresholds.
        """
        if self.router_TD is None or self.router_TD.requires_grad:
            return self.router_TD
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return min(reversed(trainable), key=Tensor.numel, default=None)

    def base_pass(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        cache: PassCache | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, BlockKeyValue]:
        """Step 0: y0 * phi[0], and the keys and values of every token."""
        y_BSD, kv = self.block(x_BSD, rotation, padding_BS, cache=cache, trace=trace)
        return y_BSD if self.phi_TD is None else (y_BSD * self.phi_TD[0]).to(y_BSD.dtype), kv

    def step(
        self,
        t: int,
        y_BSD: Tensor,
        kv: BlockKeyValue,
        rotation: Rotation,
        padding_BS: Tensor | None = None,
        cache: PassCache | None = None,
    ) -> StepResult:
        """Step t: route, run the block on the routed tokens, and join the result to the hidden states."""
        options, routed, lowest_B, unrouted_scale_BS1 = self.options, None, None, None
        if self.router_TD is None:
            y_RKD, gate_RK1 = y_BSD, y_BSD.new_ones(())
        else:
            with torch.no_grad():
                score_BS = self.score(y_BSD, t)
                routed, lowest_B = self.route(score_BS, t, padding_BS)
                if self.routing.records is not None:
                    self._record(t, score_BS, routed)
            if options.reweighting == 'symmetric':
                unrouted_scale_BS1 = 1 - self._gate(self.score(y_BSD, t))[..., None]
            elif routed is not None and routed.is_empty and options.combine != 'equation7':
                return StepResult(y_BSD, kv, lowest_B)
            y_RKD = y_BSD if routed is None else routed.gather(y_BSD)
            # Scores with a gradient are computed from the routed states, which the block keeps for its backward pass
            # anyway; from y_BSD, each step would keep the states of all tokens.
            if torch.is_grad_enabled():
                score_RK = self.score(y_RKD, t)
            else:
                score_RK = score_BS if routed is None else routed.gather(score_BS)
            gate_RK1 = self._gate(score_RK)[..., None]
        z_RKD, kv = self._think(t, y_RKD, kv, rotation, padding_BS, cache, routed)
        y_BSD = combine_step(
            options.combine,
            y_BSD,
            y_RKD,
            z_RKD,
            routed,
            gate_RK1,
            options.alpha_T[t - 1],
            None if self.phi_TD is None else self.phi_TD[t],
            options.residual_thinking,
            unrouted_scale_BS1,
        )
        return StepResult(y_BSD, kv, lowest_B)

    def _think(
        self,
        t: int,
        y_RKD: Tensor,
        kv: BlockKeyValue,
        rotation: Rotation,
        padding_BS: Tensor | None,
        cache: PassCache | None,
        routed: Selection | None,
    ) -> tuple[Tensor, BlockKeyValue]:
        """The block on the routed tokens (None: all), and the keys and values that the next step sees."""
        if routed is not None:
            if routed.is_empty:
                return y_RKD, kv
            rotation = rotation.of(routed)
        cache = cache and cache.at(t)
        if self.options.thinking_kv != 'routed_only':
            return self.block(y_RKD, rotation, padding_BS, kv, routed, cache)
        # Routed tokens that see only one another are a sequence of their own, and none of them is padding.
        padding_BS = padding_BS if self.router_TD is None else None
        return self.block(y_RKD, rotation, padding_BS, None, routed, cache)[0], kv

    def score(self, y_BSD: Tensor, t: int) -> Tensor:
        """R^(t)(y), Eq. 5, [B, S] in float32: eight bits of bfloat16 are too few to order tokens by."""
        assert self.router_TD is not None
        device, dtype = y_BSD.device.type, torch.promote_types(y_BSD.dtype, torch.float32)
        with torch.autocast(device, enabled=False) if autocast_dtype(device) else nullcontext():
            return F.linear(y_BSD.to(dtype), self.router_TD[t - 1 : t].to(dtype)).squeeze(-1)

    def route(
        self, score_BS: Tensor, t: int, padding_BS: Tensor | None = None
    ) -> tuple[Selection | None, Tensor | None]:
        """The tokens of step t, None for all; in training also the lowest score of each sequence's top k, [B].

        ``score_BS`` needs no gradient: the choice passes none on.
        """
        state, multiple, S = self.routing, self.options.token_multiple, score_BS.shape[1]
        rule, ratio = state.rule(self.training), state.ratios_T(self.training)[t - 1]
        assert rule is not None
        if padding_BS is not None:
            padding_BS = padding_BS[:, -S:]
        lowest_B = None
        if self.training or rule != 'threshold':
            routed = routing.rank(rule, score_BS, ratio, state.temperature, padding_BS, multiple, self.training)
            lowest_B = routing.lowest_routed(score_BS, routed) if self.training else None
        if rule == 'threshold':
            threshold = self.threshold(t) if ratio < 1 else -math.inf
            routed_BS = routing.above_threshold(score_BS, threshold, padding_BS)
            if torch.compiler.is_exporting():
                return Selection.of_any_number(routed_BS), lowest_B
            routed = Selection.from_mask(routed_BS, multiple, self.training)
        return None if routed.is_all else routed, lowest_B

    def threshold(self, t: int) -> Tensor | float:
        """Step t's active threshold: the calibrated one in evaluation, where there is one."""
        calibrated_LT = self.routing.calibrated_LT
        if calibrated_LT is not None and not self.training:
            return calibrated_LT[self.index][t - 1]
        return self.threshold_T[t - 1]

    def _gate(self, score: Tensor) -> Tensor:
        return routing.gate(score, self.options.weight_norm, self.routing.temperature)

    def _record(self, t: int, score_BS: Tensor, routed: Selection | None) -> None:
        assert self.routing.records is not None
        routed_BS = torch.ones_like(score_BS, dtype=torch.bool) if routed is None else routed.mask()
        threshold = torch.as_tensor(self.threshold(t), device=score_BS.device).clone()
        self.routing.records.append(RoutingRecord(self.index, t, self._gate(score_BS), routed_BS, threshold))


def thinking_layers(module: nn.Module) -> dict[int, ITTLayer]:
    """The ITT layers of a model by their index, counted from 0; sees through DDP, FSDP and compile wrappers."""
    return {layer.index: layer for layer in module.modules() if isinstance(layer, ITTLayer)}
