"""Thresholds for other token ratios than the trained ones, from held-out sequences.

    itt calibrate MODEL --data DATA --ratios 0.7/0.7/0.9 [--ratios 0.5/0.5/0.5 ...]

writes them into ``MODEL/config.json``, where ``model.set_thinking(token_ratios=...)`` finds them, and reports the
fraction of tokens that they route in sequences that they were not set from.

N sequences, B batch, S sequence length, T extra steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from itt_composer.analysis.routing_records import token_thinking
from itt_composer.atomic import write_json
from itt_composer.evaluation.held_out import batches, held_out
from itt_composer.export.check import read_folder_config
from itt_composer.export.load import load_routed
from itt_composer.model import ITTForCausalLM, ITTLayer, checked_ratios, thinking_layers
from itt_composer.model.rotary import Rotation
from itt_composer.one_line import one_line_errors
from itt_composer.ratios import parse_ratios, ratios_key

Fractions: TypeAlias = dict[tuple[int, int], float]
"""Fraction of tokens routed, by layer (from 0) and step (from 1)."""


@torch.no_grad()
def calibrate(
    model: ITTForCausalLM, sequences: Sequence[Tensor] | Tensor, token_ratios: Sequence[float], batch_size: int = 8
) -> list[list[float]]:
    """Set the thresholds with which each step routes its ratio of the tokens in ``sequences``.

    One pass, layer by layer: all sequences reach a step before its threshold is set, and continue with the tokens that
    it routes. So the thresholds of later steps and layers fit what the earlier ones do.

    Args:
        model: only ``config.calibrated_thresholds`` is changed, where ``set_thinking`` finds the thresholds.
        sequences: held-out token ids, [N, S] or N times [S]; a few ten thousand tokens are enough.
        token_ratios: fraction of tokens for each step; 0 removes a step.
        batch_size: sequences per forward pass.

    Returns:
        The thresholds, by thinking layer and step (0 for a removed step).

    Raises:
        ValueError: the model routes no tokens, a list of the wrong length or a ratio outside [0, 1].
    """
    if model.selection is None:
        raise ValueError('calibrate: the model routes no tokens, so it has no thresholds; use one with thinking: itt')
    state, ratios, was_training = model.routing, checked_ratios(model.config, token_ratios), model.training
    assert state is not None
    model.eval()
    decoder, states = model.model, []
    for ids_BS in batches(sequences, batch_size, model.device):
        position_1S = torch.arange(ids_BS.shape[1], device=ids_BS.device)[None]
        states.append(decoder.at_positions(decoder.embed_tokens(ids_BS), position_1S))
    thresholds = {i: [0.0] * len(ratios) for i in thinking_layers(model)}
    with state.temporarily(evaluation_selection='threshold', asked_T=ratios, calibrated_LT=thresholds):
        for layer in model.model.layers[: 1 + max(thresholds)]:
            if isinstance(layer, ITTLayer):
                states = _calibrate_layer(layer, states, ratios, thresholds[layer.index])
            else:
                states = [(layer(x_BSD, rotation)[0], rotation) for x_BSD, rotation in states]
    model.train(was_training)
    calibrated = model.config.calibrated_thresholds or {}
    model.config.calibrated_thresholds = {**calibrated, ratios_key(ratios): list(thresholds.values())}
    return list(thresholds.values())


def _calibrate_layer(
    layer: ITTLayer, states: list[tuple[Tensor, Rotation]], ratios: list[float], threshold_T: list[float]
) -> list[tuple[Tensor, Rotation]]:
    """The hidden states after the layer, whose active thresholds ``threshold_T`` are set on the way."""
    rotations = [rotation for _, rotation in states]
    passes = [layer.base_pass(x_BSD, rotation) for x_BSD, rotation in states]
    for t in layer.routing.steps(training=False):
        score = torch.cat([layer.score(y_BSD, t).flatten() for y_BSD, _ in passes])
        threshold_T[t - 1] = threshold_above(score, ratios[t - 1])
        passes = [layer.step(t, y_BSD, kv, r)[:2] for (y_BSD, kv), r in zip(passes, rotations, strict=True)]
    return [(y_BSD, rotation) for (y_BSD, _), rotation in zip(passes, rotations, strict=True)]


def threshold_above(score: Tensor, ratio: float) -> float:
    """Return the number that a fraction ``ratio`` of the scores exceeds; for a ratio of 1, one below any score."""
    k = math.floor(ratio * score.numel() + 0.5)
    if k >= score.numel():
        return torch.finfo(torch.float32).min
    ranked = score.double().sort(descending=True).values
    return (ranked[max(k, 1) - 1] + ranked[max(k, 1)]).item() / 2


def routed_fractions(model: ITTForCausalLM, sequences: Sequence[Tensor], batch_size: int = 8) -> Fractions:
    """Return the fraction of tokens routed to each step of each layer, with the active selection and ratios."""
    thinking = [token_thinking(model, ids_BS, batch_size) for ids_BS in batches(sequences, batch_size, model.device)]
    tokens = sum(one.depth_NS.size for one in thinking)
    fractions_M = sum(one.routed_MNS.sum(axis=(1, 2)) for one in thinking) / tokens
    return dict(zip(thinking[0].layer_steps, fractions_M.tolist(), strict=True))


def main(model_folder: Path, data: Path, ratios: list[str], sequences: int | None = None, batch_size: int = 8) -> None:
    """Set thresholds for other ratios, write them into the model's config, and report the fractions routed."""
    with one_line_errors('calibrate'):
        parsed = [parse_ratios(text) for text in ratios]
        read_folder_config(model_folder)  # The thresholds are written into it.
        model = load_routed(model_folder)
        asked = [checked_ratios(model.config, token_ratios) for token_ratios in parsed]
        rows = held_out(data, sequences, model_folder, model.config)
    to_set, to_check = (half.ids_N for half in rows.halves())
    table = Table(
        'ratios',
        'layer',
        *(f'step {t}' for t in range(1, len(asked[0]) + 1)),
        title='fraction of tokens routed',
    )
    worst = 0.0
    for token_ratios in track(asked, 'calibrating'):
        calibrate(model, to_set, token_ratios, batch_size)
        model.set_thinking(token_ratios, selection='threshold')
        fractions = routed_fractions(model, to_check, batch_size)
        for layer in dict.fromkeys(layer for layer, _ in fractions):
            by_step = [fractions.get((layer, t), 0.0) for t in range(1, len(token_ratios) + 1)]
            worst = max(worst, *(abs(fraction - ratio) for fraction, ratio in zip(by_step, token_ratios, strict=True)))
            table.add_row(ratios_key(token_ratios), f'layer{layer}', *(f'{fraction:.3f}' for fraction in by_step))
    path = model_folder / 'config.json'
    stored = json.loads(path.read_text())
    write_json({**stored, 'calibrated_thresholds': model.config.calibrated_thresholds}, path)
    console = Console()
    console.print(table)
    console.print(
        f'Thresholds from {len(to_set)} sequences, checked on {len(to_check)} others of {rows.mean_length} tokens. '
        f'Largest distance from a ratio: {worst:.3f}. Written to {path}.',
        highlight=False,
    )
