"""Probability of the correct token through the layers, by logit lens (Figure 7, right), and residual-norm growth.

Final norm and head are applied to the hidden states after each layer, and after each step of a thinking layer.

B batch, S sequence, D hidden, V vocabulary, N sequences, M documents.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from itt_composer.analysis.figure_style import line_style, tidy
from itt_composer.model import InnerLayer, ITTForCausalLM, ITTLayer, LoopLayer
from research.figures.bootstrap import ratio_of_sums
from research.figures.documents import document_numbers

QUANTITIES = ('probability', 'log_probability', 'rms')


class Point(NamedTuple):
    """Position in the model."""

    layer: int
    """Counted from 0; -1 is the embedding."""
    step: int
    """0 is the base pass."""
    depth: float
    """Layers run so far; the steps within a layer, or a block of several, are evenly spaced."""


@torch.no_grad()
def states(model: ITTForCausalLM, rows_BS: Tensor) -> Iterator[tuple[Point, Tensor]]:
    """Yield the residual stream, [B, S, D], after the embedding, every layer and every step, in this order."""
    position_1S = torch.arange(rows_BS.shape[1], device=rows_BS.device)[None]
    x_BSD, rotation = model.model.at_positions(model.model.embed_tokens(rows_BS), position_1S)
    yield Point(-1, 0, 0.0), x_BSD
    thinking = {block[0]: len(block) for block in model.config.thinking_options.thinking_blocks}
    for number, layer in enumerate(model.model.layers):
        if isinstance(layer, InnerLayer):
            continue
        if isinstance(layer, ITTLayer):
            taken = [0, *layer.routing.steps(training=False)]
        elif isinstance(layer, LoopLayer):
            taken = list(range(layer.T + 1))
        else:
            taken = [0]
        for i, t in enumerate(taken, start=1):
            if not isinstance(layer, ITTLayer):
                block = layer.block if isinstance(layer, LoopLayer) else layer
                x_BSD, _ = block(x_BSD, rotation)
            elif t == 0:
                x_BSD, kv = layer.base_pass(x_BSD, rotation)
            else:
                x_BSD, kv, _ = layer.step(t, x_BSD, kv, rotation)
            yield Point(number, t, number + thinking.get(number, 1) * i / len(taken)), x_BSD


@torch.no_grad()
def log_probability(model: ITTForCausalLM, x_BSD: Tensor, rows_BS: Tensor) -> Tensor:
    """Return log p of each next token from the hidden states x, by final norm and head, float32 [B, S - 1]."""
    logits_BSV = model.lm_head(model.model.norm(x_BSD[:, :-1])).float()
    return -F.cross_entropy(logits_BSV.flatten(0, 1), rows_BS[:, 1:].flatten(), reduction='none').view(len(rows_BS), -1)


def measure(models: Mapping[str, ITTForCausalLM], domains: Mapping[str, Tensor]) -> pd.DataFrame:
    """Average over the tokens, at every point of every model: probability of the correct token, its log, residual norm.

    Args:
        models: by name in the figure; each with its active selection.
        domains: held-out sequences, [N, S], by domain, from the start of its set.

    Returns:
        A row for each model and point: ``model``, ``layer``, ``step``, ``depth``, and ``probability``,
        ``log_probability`` and ``rms`` (of a hidden state over its D values), each with ``_low`` and ``_high``, a 95 %
        interval by bootstrap over documents.
    """
    table = []
    numbers = document_numbers(domains, next(iter(models.values())).config.bos_token_id)
    rows_NS, document_NS = torch.cat(list(domains.values())), np.concatenate(list(numbers.values()))[:, :-1]
    tokens_M = np.bincount(document_NS.ravel())
    for name, model in models.items():
        sums: dict[Point, np.ndarray] = defaultdict(lambda: np.zeros((len(QUANTITIES), len(tokens_M))))
        for row_1S, document_S in zip(track(rows_NS.split(1), f'logit lens: {name}'), document_NS, strict=True):
            row_1S = row_1S.to(model.device)
            for point, x_1SD in states(model, row_1S):
                log_p = log_probability(model, x_1SD, row_1S).double()
                rms = x_1SD[:, :-1].double().square().mean(-1).sqrt()
                for sum_M, x_1S in zip(sums[point], (log_p.exp(), log_p, rms), strict=True):
                    sum_M += np.bincount(document_S, weights=x_1S[0].cpu(), minlength=len(sum_M))
        read = tokens_M > 0
        for point, sums_QM in sums.items():
            estimates = (ratio_of_sums(np.stack([sum_M, tokens_M], axis=-1)[read]) for sum_M in sums_QM)
            table.append((name, *point, *itertools.chain(*estimates)))
    columns = ['model', 'layer', 'step', 'depth']
    for name in QUANTITIES:
        columns += [name, f'{name}_low', f'{name}_high']
    return pd.DataFrame(table, columns=columns)


def plot(table: pd.DataFrame) -> Figure:
    """Plot probability and log probability of the correct token over depth, one line for each model.

    Args:
        table: the result of :func:`measure`.
    """
    figure = Figure(figsize=(9, 3.8), dpi=140, layout='constrained')
    left, right = figure.subplots(1, 2)
    _lines(left, table, 'probability')
    _lines(right, table, 'log_probability')
    left.set_ylabel('probability of the correct token', fontsize=9)
    right.set_ylabel('log probability of the correct token (nats)', fontsize=9)
    left.legend(fontsize=8, frameon=False)
    return figure


def plot_growth(table: pd.DataFrame) -> Figure:
    """Plot the root mean square of the residual stream over depth, one line for each model.

    Args:
        table: the result of :func:`measure`.
    """
    figure = Figure(figsize=(5.5, 3.8), dpi=140, layout='constrained')
    axis = figure.subplots()
    _lines(axis, table, 'rms')
    axis.set_yscale('log')
    axis.set_ylabel('root mean square of the residual stream', fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _lines(axis: Axes, table: pd.DataFrame, quantity: str) -> None:
    for i, (name, rows) in enumerate(table.groupby('model', sort=False)):
        style = line_style(i)
        marker, colour = style.pop('marker'), style['color']
        axis.fill_between(
            rows['depth'], rows[f'{quantity}_low'], rows[f'{quantity}_high'], color=colour, alpha=0.15, linewidth=0
        )
        axis.plot(rows['depth'], rows[quantity], linewidth=1.4, **style)
        # Hollow: before the layer's last step.
        done = rows['depth'] == rows['layer'] + 1
        for points, face in ((rows[done], colour), (rows[~done], 'white')):
            axis.plot(points['depth'], points[quantity], marker, color=colour, markerfacecolor=face, markersize=5)
        axis.plot([], [], marker=marker, label=name, **style)
    axis.set_xticks(range(table['layer'].max() + 2))
    axis.set_xlabel('layers run (hollow: within a thinking layer, before its last step)', fontsize=8)
    tidy(axis)
