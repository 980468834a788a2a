"""Thresholds for other ratios than those of the training, from held-out rows.

    itt calibrate MODEL --data DATA --ratios 0.7/0.7/0.9 [--ratios 0.5/0.5/0.5 ...]

writes them into ``MODEL/config.json``, where ``model.set_thinking(token_ratios=...)`` finds them, and reports the share
of tokens that they choose on rows that they were not set from.

B batch, S sequence, N rows, T extra steps.
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
from itt_composer.atomic import check_writable, write_text
from itt_composer.evaluation.held_out import held_out_rows
from itt_composer.export.check import read_folder_config
from itt_composer.export.load import load_routed
from itt_composer.model import ITTForCausalLM, ITTLayer, checked_ratios, thinking_layers
from itt_composer.model.block import Rotation
from itt_composer.options import parse_ratios, ratios_key

Shares: TypeAlias = dict[tuple[int, int], float]
"""Share of tokens chosen, by layer (counted from 1) and step."""


@torch.no_grad()
def calibrate(
    model: ITTForCausalLM, rows_NS: Tensor, token_ratios: Sequence[float], batch_size: int = 8
) -> list[list[float]]:
    """Set the thresholds with which each step chooses its ratio of the tokens in ``rows_NS``.

    One pass over the rows, layer by layer: all rows reach a step before its threshold is set, and go on with the tokens
    that it chooses. So the thresholds of later steps and layers fit what the earlier ones do.

    Args:
        model: kept as it is but for ``config.calibrated_thresholds``, where ``set_thinking`` finds the thresholds.
        rows_NS: held-out token ids; a few ten thousand tokens are enough.
        token_ratios: share of tokens for each step; 0 for a step removed.
        batch_size: rows computed at a time.

    Returns:
        The thresholds, by thinking layer and step (0 for a step removed).

    Raises:
        ValueError: the model routes no tokens, a list of the wrong length or a ratio outside [0, 1].
    """
    if model.selection is None:
        raise ValueError('calibrate: the model routes no tokens, so it has no thresholds')
    state, ratios, was_training = model.routing, checked_ratios(model.config, token_ratios), model.training
    assert state is not None
    model.eval()
    rows_NS = rows_NS.to(model.device)
    rotation = Rotation.at(torch.arange(rows_NS.shape[1], device=rows_NS.device)[None], model.config)
    states = [model.model.embed_tokens(rows_BS) for rows_BS in rows_NS.split(batch_size)]
    thresholds = {i: [0.0] * len(ratios) for i in thinking_layers(model)}
    with state.temporarily(evaluation_selection='threshold', asked_T=ratios, calibrated_LT=thresholds):
        for layer in model.model.layers[: 1 + max(thresholds)]:
            if isinstance(layer, ITTLayer):
                states = _calibrate_layer(layer, states, rotation, ratios, thresholds[layer.index])
            else:
                states = [layer(x_BSD, rotation)[0] for x_BSD in states]
    model.train(was_training)
    calibrated = model.config.calibrated_thresholds or {}
    model.config.calibrated_thresholds = {**calibrated, ratios_key(ratios): list(thresholds.values())}
    return list(thresholds.values())


def _calibrate_layer(
    layer: ITTLayer, states: list[Tensor], rotation: Rotation, ratios: list[float], threshold_T: list[float]
) -> list[Tensor]:
    """The hidden states after the layer, whose active thresholds ``threshold_T`` are set on the way."""
    passes = [layer.base_pass(x_BSD, rotation) for x_BSD in states]
    for t in layer.routing.steps(training=False):
        score = torch.cat([layer.score(y_BSD, t).flatten() for y_BSD, _ in passes])
        threshold_T[t - 1] = threshold_above(score, ratios[t - 1])
        passes = [layer.step(t, y_BSD, kv, rotation)[:2] for y_BSD, kv in passes]
    return [y_BSD for y_BSD, _ in passes]


def threshold_above(score: Tensor, ratio: float) -> float:
    """The number that a share ``ratio`` of the scores exceeds; for a share of one, a number below any score."""
    k = math.floor(ratio * score.numel() + 0.5)
    if k >= score.numel():
        return torch.finfo(torch.float32).min
    ranked = score.double().sort(descending=True).values
    return (ranked[max(k, 1) - 1] + ranked[max(k, 1)]).item() / 2


def shares_chosen(model: ITTForCausalLM, rows_NS: Tensor, batch_size: int = 8) -> Shares:
    """The share of tokens that each step of each layer chooses under the rule and the ratios in force."""
    thinking = token_thinking(model, rows_NS, batch_size)
    shares_M = thinking.chosen_MNS.mean(axis=(1, 2))
    return dict(zip(thinking.layer_steps, shares_M.tolist(), strict=True))


def main(model_folder: Path, data: Path, ratios: list[str], rows: int = 64, batch_size: int = 8) -> None:
    """Set thresholds for other ratios, write them into the model's config, and report the shares really chosen."""
    try:
        asked = [parse_ratios(text) for text in ratios]
        read_folder_config(model_folder)  # The thresholds are written into it.
        model = load_routed(model_folder)
        for token_ratios in asked:
            checked_ratios(model.config, token_ratios)
        rows_NS = held_out_rows(data, rows, model.config)
        check_writable(model_folder / 'config.json')
    except (ValueError, OSError) as error:
        raise SystemExit(f'calibrate: {error}') from None
    # Shuffled, because the rows come from the domains in turn and small domains end early.
    to_set, to_check = rows_NS[torch.randperm(rows, generator=torch.Generator().manual_seed(0))].tensor_split(2)
    table = Table('ratios', 'layer', *(f'step {t}' for t in range(1, len(asked[0]) + 1)), title='share chosen')
    worst = 0.0
    for token_ratios in track(asked, 'calibrating'):
        calibrate(model, to_set, token_ratios, batch_size)
        model.set_thinking(token_ratios, selection='threshold')
        shares = shares_chosen(model, to_check, batch_size)
        for i in thinking_layers(model):
            by_step = [shares.get((i + 1, t), 0.0) for t in range(1, len(token_ratios) + 1)]
            worst = max(worst, *(abs(share - ratio) for share, ratio in zip(by_step, token_ratios, strict=True)))
            table.add_row(ratios_key(token_ratios), str(i + 1), *(f'{share:.3f}' for share in by_step))
    write_thresholds(model, model_folder)
    console = Console()
    console.print(table)
    console.print(
        f'Thresholds from {len(to_set)} rows, checked on {len(to_check)} others of {rows_NS.shape[1]} tokens; '
        f'farthest from its ratio: {worst:.3f}. Written to {model_folder / "config.json"}.',
        highlight=False,
    )


def write_thresholds(model: ITTForCausalLM, folder: Path) -> None:
    """Put the model's calibrated thresholds into the folder's config, which is otherwise left as it is."""
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    config['calibrated_thresholds'] = model.config.calibrated_thresholds
    write_text(json.dumps(config, indent=2) + '\n', path)
