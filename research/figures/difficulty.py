"""Are tokens with more extra steps harder? A token's steps against the loss of the dense baseline (Section 4.4).

A token has two losses of the dense baseline: that of the next token, which the hidden states at this position predict
(``next``), and that of the token itself, predicted from those before it (``own``).

N sequences of S tokens, M pairs of a layer and a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from itt_composer.analysis.figure_style import COLOURS, line_style, tidy
from itt_composer.analysis.routing_records import TokenThinking, token_thinking
from itt_composer.model import ITTForCausalLM
from research.figures.bootstrap import difference_of_ratios, spearman, sums_by_document
from research.figures.documents import document_numbers

ALL = 'all'


@torch.no_grad()
def next_token_loss(model: ITTForCausalLM, rows_NS: Tensor, batch_size: int = 4) -> np.ndarray:
    """Return the cross-entropy of each next token in nats, float32 [N, S - 1]."""
    parts = []
    for rows_BS in rows_NS.to(model.device).split(batch_size):
        logits_BSV = model(rows_BS).logits[:, :-1].float()
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), rows_BS[:, 1:].flatten(), reduction='none')
        parts.append(loss.view(len(rows_BS), -1).cpu())
    return torch.cat(parts).numpy()


def measure(
    model: ITTForCausalLM, dense: ITTForCausalLM, domains: Mapping[str, Tensor]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare the number of extra steps, under the active selection, with the loss of the dense baseline.

    Args:
        model: the ITT model.
        dense: the dense baseline; its loss says how hard a token is.
        domains: held-out sequences, [N, S], by domain, from the start of its set.

    Returns:
        Two tables, with 95 % intervals by bootstrap over documents. Spearman's rank correlation for each domain and for
        all: ``domain``, ``documents``, ``tokens``, ``loss`` (``next`` or ``own``), ``correlation``, ``low``, ``high``.
        And, over all domains, for each step: ``layer``, ``step``, ``fraction_routed``, ``fraction_routed_again`` (of
        those routed to the layer's step before), mean ``loss_routed`` and ``loss_not_routed`` of the next token, their
        ``difference``, ``low``, ``high``.
    """
    thinking = {
        domain: token_thinking(model, rows) for domain, rows in track(domains.items(), 'extra steps of the tokens')
    }
    losses = {
        domain: next_token_loss(dense, rows) for domain, rows in track(domains.items(), 'loss of the dense baseline')
    }
    documents = document_numbers(domains, model.config.bos_token_id)
    measured = {domain: (thinking[domain].depth_NS, losses[domain], documents[domain]) for domain in domains}
    rows = [row for domain, part in measured.items() for row in _correlations(domain, *part)]
    all_losses, all_documents = np.concatenate(list(losses.values())), np.concatenate(list(documents.values()))
    if len(domains) > 1:
        depth_NS = np.concatenate([part.depth_NS for part in thinking.values()])
        rows += _correlations(ALL, depth_NS, all_losses, all_documents)
    columns = ['domain', 'documents', 'tokens', 'loss', 'correlation', 'low', 'high']
    by_step = _by_step(list(thinking.values()), all_losses, all_documents[:, :-1])
    return pd.DataFrame(rows, columns=columns), by_step


def _correlations(domain: str, depth_NS: np.ndarray, loss_NS: np.ndarray, document_NS: np.ndarray) -> list[tuple]:
    # The last token of a sequence has no next one, the first none before it.
    pairs = (('next', depth_NS[:, :-1], document_NS[:, :-1]), ('own', depth_NS[:, 1:], document_NS[:, 1:]))
    return [
        (domain, len(np.unique(document)), loss_NS.size, loss, *spearman(depth, loss_NS, document))
        for loss, depth, document in pairs
    ]


def _by_step(thinking: list[TokenThinking], loss_NS: np.ndarray, document_NS: np.ndarray) -> pd.DataFrame:
    layer_steps = thinking[0].layer_steps
    routed_MNS = np.concatenate([part.routed_MNS[:, :, :-1] for part in thinking], axis=1)
    table = []
    for m, (layer, step) in enumerate(layer_steps):
        routed_NS = routed_MNS[m]
        parts = loss_NS * routed_NS, routed_NS, loss_NS * ~routed_NS, ~routed_NS
        sums_D4 = sums_by_document(parts, document_NS)
        difference = difference_of_ratios(sums_D4)
        of_routed, routed, of_others, others = sums_D4.sum(0)
        before = routed_MNS[m - 1] if m and layer_steps[m - 1][0] == layer else None
        again = float('nan') if before is None else _ratio((routed_NS & before).sum(), before.sum())
        table.append(
            (layer, step, routed_NS.mean(), again, _ratio(of_routed, routed), _ratio(of_others, others), *difference)
        )
    columns = ['layer', 'step', 'fraction_routed', 'fraction_routed_again', 'loss_routed', 'loss_not_routed']
    return pd.DataFrame(table, columns=[*columns, 'difference', 'low', 'high'])


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float('nan')


def plot_correlations(table: pd.DataFrame) -> Figure:
    """Plot the rank correlation of extra steps with the loss of the dense baseline, by domain.

    Args:
        table: the first of :func:`measure`.
    """
    domains = list(dict.fromkeys(table['domain']))
    figure = Figure(figsize=(6, 1.2 + 0.35 * len(domains)), dpi=140, layout='constrained')
    axis = figure.subplots()
    names = {'next': 'loss of the next token', 'own': 'loss of the token itself'}
    for i, (loss, rows) in enumerate(table.groupby('loss', sort=False)):
        heights = [-domains.index(domain) + (0.12 if i == 0 else -0.12) for domain in rows['domain']]
        _points_with_intervals(axis, rows['correlation'], heights, rows, i + 1, names[str(loss)])
    axis.set_yticks([-i for i in range(len(domains))], domains)
    axis.set_xlabel("Spearman's rank correlation with the number of extra steps", fontsize=9)
    figure.legend(loc='outside upper center', ncols=2, fontsize=8, frameon=False)
    return figure


def plot_by_step(table: pd.DataFrame) -> Figure:
    """Plot the loss of the dense baseline at the tokens routed to each step minus that at the others.

    Args:
        table: the second of :func:`measure`.
    """
    names = [f'layer{layer}/step{step}' for layer, step in zip(table['layer'], table['step'], strict=True)]
    figure = Figure(figsize=(6, 1.2 + 0.28 * len(names)), dpi=140, layout='constrained')
    axis = figure.subplots()
    _points_with_intervals(axis, table['difference'], [-i for i in range(len(names))], table, 1, None)
    axis.set_yticks([-i for i in range(len(names))], names)
    axis.set_xlabel('next-token loss of the dense baseline: routed minus not routed (nats)', fontsize=9)
    return figure


def _points_with_intervals(
    axis: Axes, values: pd.Series, heights: list[float], rows: pd.DataFrame, i: int, label: str | None
) -> None:
    style = {**line_style(i), 'linestyle': 'none'}
    errors = [values - rows['low'], rows['high'] - values]
    axis.errorbar(values, heights, xerr=errors, label=label, markersize=5, capsize=3, linewidth=1.2, **style)
    axis.axvline(0, color=COLOURS[0], linewidth=0.8)
    tidy(axis, grid='x')
