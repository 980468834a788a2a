"""Are the tokens that think more the harder ones? A token's depth against the plain model's loss (Section 4.4).

Two losses of the plain model belong to a token: that of the token which comes next, which the states at this place have
to predict (``next``), and that of the token itself, predicted from those before it (``own``).

N rows, S sequence, M pairs of a layer and a step.
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
    """Cross-entropy in nats of each token that follows, float32 [N, S - 1]."""
    parts = []
    for rows_BS in rows_NS.to(model.device).split(batch_size):
        logits_BSV = model(rows_BS).logits[:, :-1].float()
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), rows_BS[:, 1:].flatten(), reduction='none')
        parts.append(loss.view(len(rows_BS), -1).cpu())
    return torch.cat(parts).numpy()


def measure(
    model: ITTForCausalLM, plain: ITTForCausalLM, domains: Mapping[str, Tensor]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Depth under the rule in force against the plain model's loss.

    Args:
        model: the model that thinks.
        plain: the one whose loss says how hard a token is.
        domains: held-out rows, [N, S], by domain, the first of its set.

    Returns:
        Two tables, with 95 % intervals by bootstrap over documents. Spearman's rank correlation for each domain and for
        all: ``domain``, ``documents``, ``tokens``, ``loss`` (``next`` or ``own``), ``correlation``, ``low``, ``high``.
        And, over all domains, for each step: ``layer``, ``step``, ``share_chosen``, ``share_chosen_again`` (of those
        that the layer's step before chose), mean ``loss_chosen`` and ``loss_not_chosen`` of the next token, their
        ``difference``, ``low``, ``high``.
    """
    thinking = {domain: token_thinking(model, rows) for domain, rows in track(domains.items(), 'depth of the tokens')}
    losses = {domain: next_token_loss(plain, rows) for domain, rows in track(domains.items(), "the plain model's loss")}
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
    # The last token of a row has no next one, the first none before it.
    pairs = (('next', depth_NS[:, :-1], document_NS[:, :-1]), ('own', depth_NS[:, 1:], document_NS[:, 1:]))
    return [
        (domain, len(np.unique(document)), loss_NS.size, loss, *spearman(depth, loss_NS, document))
        for loss, depth, document in pairs
    ]


def _by_step(thinking: list[TokenThinking], loss_NS: np.ndarray, document_NS: np.ndarray) -> pd.DataFrame:
    layer_steps = thinking[0].layer_steps
    chosen_MNS = np.concatenate([part.chosen_MNS[:, :, :-1] for part in thinking], axis=1)
    table = []
    for m, (layer, step) in enumerate(layer_steps):
        chosen_NS = chosen_MNS[m]
        parts = loss_NS * chosen_NS, chosen_NS, loss_NS * ~chosen_NS, ~chosen_NS
        sums_D4 = sums_by_document(parts, document_NS)
        difference = difference_of_ratios(sums_D4)
        of_chosen, chosen, of_others, others = sums_D4.sum(0)
        before = chosen_MNS[m - 1] if m and layer_steps[m - 1][0] == layer else None
        again = float('nan') if before is None else _ratio((chosen_NS & before).sum(), before.sum())
        table.append(
            (layer, step, chosen_NS.mean(), again, _ratio(of_chosen, chosen), _ratio(of_others, others), *difference)
        )
    columns = ['layer', 'step', 'share_chosen', 'share_chosen_again', 'loss_chosen', 'loss_not_chosen']
    return pd.DataFrame(table, columns=[*columns, 'difference', 'low', 'high'])


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float('nan')


def plot_correlations(table: pd.DataFrame) -> Figure:
    """Rank correlation of depth with the plain model's loss, by domain.

    Args:
        table: the first that :func:`measure` gives.
    """
    domains = list(dict.fromkeys(table['domain']))
    figure = Figure(figsize=(6, 1.2 + 0.35 * len(domains)), dpi=140, layout='constrained')
    axis = figure.subplots()
    names = {'next': 'loss of the next token', 'own': 'loss of the token itself'}
    for i, (loss, rows) in enumerate(table.groupby('loss', sort=False)):
        heights = [-domains.index(domain) + (0.12 if i == 0 else -0.12) for domain in rows['domain']]
        _points_with_intervals(axis, rows['correlation'], heights, rows, i + 1, names[str(loss)])
    axis.set_yticks([-i for i in range(len(domains))], domains)
    axis.set_xlabel("Spearman's rank correlation with the number of steps that a token takes", fontsize=9)
    figure.legend(loc='outside upper center', ncols=2, fontsize=8, frameon=False)
    return figure


def plot_by_step(table: pd.DataFrame) -> Figure:
    """By how much the plain model's loss is higher at the tokens that each step chooses.

    Args:
        table: the second that :func:`measure` gives.
    """
    names = [f'{layer}-{step}' for layer, step in zip(table['layer'], table['step'], strict=True)]
    figure = Figure(figsize=(6, 1.2 + 0.28 * len(names)), dpi=140, layout='constrained')
    axis = figure.subplots()
    _points_with_intervals(axis, table['difference'], [-i for i in range(len(names))], table, 1, None)
    axis.set_yticks([-i for i in range(len(names))], names)
    axis.set_ylabel('layer-step', fontsize=9)
    axis.set_xlabel("plain model's loss of the next token: chosen less not chosen (nats)", fontsize=9)
    return figure


def _points_with_intervals(
    axis: Axes, values: pd.Series, heights: list[float], rows: pd.DataFrame, i: int, label: str | None
) -> None:
    style = {**line_style(i), 'linestyle': 'none'}
    errors = [values - rows['low'], rows['high'] - values]
    axis.errorbar(values, heights, xerr=errors, label=label, markersize=5, capsize=3, linewidth=1.2, **style)
    axis.axvline(0, color=COLOURS[0], linewidth=0.8)
    tidy(axis, grid='x')
