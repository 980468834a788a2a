"""How tokens are routed now: one object for all layers of a model, and the only place where that is changed.

What applies, the first that is set:

    mode          rule                    token ratios        thresholds of threshold routing
    training      ``selection``           ``capacity_T``      the layer's own
    evaluation    ``evaluation_selection``  ``asked_T``, else   ``calibrated_LT``, else the layer's own
                                            ``capacity_T``

``selection`` is the model's option. ``capacity_T`` and ``temperature`` start at the model's options and are set by the
capacity warm-up. The others are set by ``model.set_thinking``, and for a while by :meth:`RoutingState.temporarily`.

T extra steps, L thinking layers, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from itt_composer.model.config import ITTConfig


@dataclass
class RoutingRecord:
    """What the router of one step did in one forward pass."""

    layer: int
    """Counted from 0; the first of a block of several."""
    step: int
    """Counted from 1."""
    gate_BS: Tensor
    routed_BS: Tensor
    threshold: Tensor


@dataclass
class RoutingState:
    """See the module. Every field may be set at any time."""

    selection: str | None
    """None: the model has no routers, and every token takes every step."""
    evaluation_selection: str
    capacity_T: list[float]
    temperature: float
    asked_T: list[float] | None = None
    calibrated_LT: dict[int, list[float]] | None = None
    """By the layer's number (a block's first), counted from 0."""
    records: list[RoutingRecord] | None = None
    """Every step of a forward pass appends one; None: nothing is recorded."""

    @classmethod
    def of(cls, config: ITTConfig) -> RoutingState:
        """The state that a model with ``config`` starts in, without calibrated thresholds."""
        options = config.thinking_options
        assert options.token_ratios is not None
        return cls(
            selection=options.selection if options.token_routing else None,
            evaluation_selection=options.evaluation_selection,
            capacity_T=list(options.token_ratios),
            temperature=float(config.router_temperature),
        )

    def rule(self, training: bool) -> str | None:
        """``top_k``, ``top_p`` or ``threshold``; None where nothing is routed."""
        return self.selection if training or self.selection is None else self.evaluation_selection

    def ratios_T(self, training: bool) -> list[float]:
        """The fraction of the tokens that each step is to process."""
        return self.capacity_T if training or self.asked_T is None else self.asked_T

    def steps(self, training: bool) -> list[int]:
        """The steps that are taken, of 1..T; in evaluation a ratio of 0 removes one."""
        return [t for t, ratio in enumerate(self.ratios_T(training), start=1) if training or ratio > 0]

    def set_calibrated(self, layers: list[int], thresholds_LT: list[list[float]] | None) -> None:
        """Use these thresholds in evaluation, one list per thinking layer or block; None: the layers' own."""
        self.calibrated_LT = None
        if thresholds_LT is not None:
            self.calibrated_LT = {i: list(own_T) for i, own_T in zip(layers, thresholds_LT, strict=True)}

    @contextmanager
    def temporarily(self, **fields: Any) -> Iterator[None]:
        """Set fields within a ``with`` block."""
        before = {key: getattr(self, key) for key in fields}
        vars(self).update(fields)
        try:
            yield
        finally:
            vars(self).update(before)

    @contextmanager
    def recording(self) -> Iterator[list[RoutingRecord]]:
        """Record the forward passes within a ``with`` block, in the order in which the steps run."""
        with self.temporarily(records=[]):
            assert self.records is not None
            yield self.records


def routing_state(module: nn.Module) -> RoutingState | None:
    """The routing state of the ITT model in ``module``, through any wrappers; None where there is none."""
    states = (getattr(part, 'routing', None) for part in module.modules())
    return next((state for state in states if isinstance(state, RoutingState)), None)
