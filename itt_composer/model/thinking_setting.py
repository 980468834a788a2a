"""Routing and token ratios that are set after training (Section 4.3)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from itt_composer.checks import check_choice, check_value
from itt_composer.model.config import ITTConfig
from itt_composer.model.routing_state import RoutingState
from itt_composer.model.thinking import ITTLayer, thinking_layers
from itt_composer.options import SELECTION
from itt_composer.ratios import as_ratios, ratios_key


@dataclass(frozen=True)
class ThinkingSetting:
    """The token ratios and the routing of a model in evaluation."""

    token_ratios: list[float]
    selection: str
    thresholds: list[list[float]] | None
    """Calibrated ones by thinking layer and step, for ``threshold``; None for those of the training."""


def thinking_setting(
    config: ITTConfig, token_ratios: Sequence[float] | str | None = None, selection: str | None = None
) -> ThinkingSetting:
    """What :meth:`ThinkingSettings.set_thinking` sets on a model with ``config``; None stands for the model's own.

    Raises:
        ValueError: as ``set_thinking`` does. Nothing but the config is needed to know.
    """
    if config.thinking != 'itt':
        raise ValueError(
            f'set_thinking: a model with thinking: {config.thinking} has no extra steps; leave this call out'
        )
    if selection is not None:
        check_choice('selection', selection, SELECTION)
        if not config.token_routing:
            raise ValueError('selection: a model with token_routing: false routes no tokens; leave it out')
    ratios = list(config.token_ratios) if token_ratios is None else checked_ratios(config, token_ratios)
    rule = selection or config.evaluation_selection
    needs_thresholds = config.token_routing and rule == 'threshold'
    return ThinkingSetting(ratios, rule, _thresholds(config, ratios) if needs_thresholds else None)


def checked_ratios(config: ITTConfig, token_ratios: Sequence[float] | str) -> list[float]:
    """The ratios, a list or text such as ``0.7/0.7/0.9``, as a list of T numbers.

    Raises:
        ValueError: something else, a list of the wrong length, or a ratio that the model cannot take.
    """
    ratios, trained = as_ratios('token_ratios', token_ratios), config.token_ratios
    if len(ratios) != len(trained):
        raise ValueError(
            f'token_ratios: {len(ratios)} ratios for {len(trained)} extra steps; set one per step, 0 to remove a step'
        )
    for t, ratio in enumerate(ratios, start=1):
        check_value(f'token_ratios: step {t}', ratio, 'float', minimum=0, maximum=1)
        if not config.token_routing and ratio not in (0, 1):
            raise ValueError(f'token_ratios: {ratio:g} for step {t}; without token_routing a ratio is 0 or 1')
    return ratios


def _thresholds(config: ITTConfig, ratios: list[float]) -> list[list[float]] | None:
    calibrated = config.calibrated_thresholds or {}
    if ratios_key(ratios) in calibrated:
        return calibrated[ratios_key(ratios)]
    if _are_trained(config, ratios):
        return calibrated.get(ratios_key(config.token_ratios))
    known = ', '.join([ratios_key(config.token_ratios), *calibrated])
    raise ValueError(
        f'token_ratios: no thresholds for {ratios_key(ratios)} (there are some for {known}); calibrate the exported '
        f'model for them (itt calibrate --ratios {ratios_key(ratios)}), or set selection: top_k, which '
        'is non-causal'
    )


def _are_trained(config: ITTConfig, ratios: list[float]) -> bool:
    """Whether the thresholds of the training are those of the ratios; a step that is removed needs none."""
    return all(ratio in (0, trained) for ratio, trained in zip(ratios, config.token_ratios, strict=True))


class ThinkingSettings:
    """What an ITT model adds to a dense one: token ratios and routing in evaluation, as one call."""

    config: ITTConfig
    routing: RoutingState | None
    """How tokens are routed now; None for a model without ITT layers."""
    training: bool
    _thresholds_checked = False

    @property
    def selection(self) -> str | None:
        """The active selection (another in training than in evaluation); None where no tokens are routed."""
        return None if self.routing is None else self.routing.rule(self.training)

    def set_thinking(self, token_ratios: Sequence[float] | str | None = None, selection: str | None = None) -> None:
        """Change the token ratios and the routing in evaluation.

        The weights and ``config.token_ratios`` stay what they were trained with; a model that is loaded again starts
        from those.

        A threshold belongs to the ratios it was set for: those of the training, or those that ``calibrate`` was given
        (saved in ``config.calibrated_thresholds``). Steps of the trained setting may also be removed without a
        calibration; the later steps then route somewhat other fractions.

        Args:
            token_ratios: fraction of the tokens for each of the T extra steps; 0 removes a step, and all removed leave
                the base pass times ``phi[0]``. A list, or text such as ``0.7/0.7/0.9``. None: as they are.
            selection: ``threshold``, ``top_k`` or ``top_p``. None: as it is.

        Raises:
            ValueError: the model has no extra steps, a selection for one that routes no tokens, a list of the wrong
                length, a ratio outside [0, 1], or ``threshold`` with ratios that no thresholds were set for.
        """
        state = self.routing
        if token_ratios is None and state is not None:
            token_ratios = state.asked_T
        # Under another selection the active ratios needed no thresholds; under this one they may.
        if selection is None and state is not None and state.selection is not None:
            selection = state.evaluation_selection
        setting = thinking_setting(self.config, token_ratios, selection)
        assert state is not None
        state.evaluation_selection = setting.selection
        if token_ratios is not None:
            state.asked_T = list(setting.token_ratios)
        state.set_calibrated(list(thinking_layers(self)), setting.thresholds)  # type: ignore[arg-type]

    def commit_thresholds(self) -> None:
        """Move the routing thresholds by what the training forward passes since the last commit have seen."""
        for layer in self._routed_layers():
            layer.commit_thresholds()

    def _use_calibrated_thresholds(self) -> None:
        """Start from the thresholds that a calibration has set for the ratios of the training, if one has."""
        own = (self.config.calibrated_thresholds or {}).get(ratios_key(self.config.token_ratios))
        if self.routing is not None:
            self.routing.set_calibrated(list(thinking_layers(self)), own)  # type: ignore[arg-type]

    def _forget_calibration(self, reason: str = 'the model is trained further') -> None:
        """Drop what was calibrated for weights that are about to change; a model that is trained needs none."""
        if not self.config.calibrated_thresholds:
            return
        known, state, reset = ', '.join(self.config.calibrated_thresholds), self.routing, ''
        assert state is not None
        self.config.calibrated_thresholds = None
        state.calibrated_LT = None
        if state.asked_T and state.evaluation_selection == 'threshold' and not _are_trained(self.config, state.asked_T):
            state.asked_T, reset = None, f', and the token ratios are {ratios_key(self.config.token_ratios)} again'
        warnings.warn(
            f'calibrated_thresholds: {reason}, so those for {known} are dropped{reset}; calibrate '
            'it again afterwards (itt calibrate)',
            stacklevel=3,
        )

    def _routed_layers(self) -> list[ITTLayer]:
        return [layer for layer in thinking_layers(self).values() if layer.router_TD is not None]  # type: ignore[arg-type]

    def _require_causal(self) -> None:
        """Refuse to decode with non-causal routing."""
        if self.selection not in (None, 'threshold'):
            raise ValueError(
                f'selection: {self.selection} lets later tokens decide which earlier ones are routed, so nothing can '
                "be generated with it; call model.eval() and model.set_thinking(selection='threshold')"
            )

    def _warn_of_fresh_thresholds(self) -> None:
        """Once, where threshold routing is to use thresholds that nothing has set."""
        if self._thresholds_checked or self.training or self.selection != 'threshold' or torch.compiler.is_compiling():
            return
        self.commit_thresholds()
        assert self.routing is not None
        updates = [layer.threshold_updates for layer in self._routed_layers()]
        if self.routing.calibrated_LT is None and not all(count.is_meta or count for count in updates):
            if any(parameter.is_meta for parameter in self.parameters()):  # type: ignore[attr-defined]
                raise ValueError(
                    'selection: threshold, and the thresholds of layers on disk were not read, or never trained; load '
                    'the model with from_pretrained(..., device_map=...), or give accelerate offload_buffers=True'
                )
            warnings.warn(
                'selection: threshold, but neither training nor calibration has set the thresholds: every score above '
                '0 is routed, which is a gate value above 0.5 of a sigmoid router. Train the model, calibrate it '
                '(itt calibrate), or evaluate with selection: top_k',
                stacklevel=3,
            )
        self._thresholds_checked = True
