"""Perplexity against FLOPs of one trained model at many token ratios (Tables 2 and 4, Figure 6 left).

    itt sweep MODEL --data DATA [--ratios 0.9/0.5/0.1 ...] --out sweep

writes ``sweep.csv`` and ``sweep.png``: for every setting the perplexity with threshold routing (causal), that of a
left-to-right model, and with top-k routing (non-causal), as the paper measures. Their difference is the causal gap. Of
test examples (``DATA/test.jsonl``), it is the perplexity of the answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from itt_composer.analysis.figure_style import line_style, tidy
from itt_composer.atomic import write_bytes, write_text
from itt_composer.evaluation.calibrate import calibrate, routed_fractions
from itt_composer.evaluation.held_out import HeldOut, batches, held_out
from itt_composer.export.load import load_routed
from itt_composer.flops import Decoder, exact_flops, paper_flops
from itt_composer.model import ITTForCausalLM, checked_ratios
from itt_composer.model.loss import IGNORED
from itt_composer.one_line import one_line_errors
from itt_composer.paper.tables import elastic_rows
from itt_composer.ratios import parse_ratios, ratios_key

HEADINGS = (
    'token ratios',
    "GFLOPs, paper's count",
    'GFLOPs, exact',
    'perplexity, threshold',
    'perplexity, top-k',
    'threshold minus top-k',
    'error of fractions',
)


@dataclass
class Setting:
    """One row of the table. FLOPs are of a forward pass of one sequence."""

    ratios: str
    paper_gflops: float
    exact_gflops: float
    perplexity_threshold: float
    perplexity_top_k: float
    causal_gap: float
    """``perplexity_threshold`` minus ``perplexity_top_k``."""
    share_error: float
    """Largest distance of a routed fraction from its ratio, over steps and layers, with threshold routing."""


def settings_for(steps: int, trained: Sequence[float], asked: Sequence[str]) -> list[list[float]]:
    """Return the ratios to evaluate: ``asked``, the trained ones, all steps removed, and for x4 those of Table 2.

    For other numbers of steps, every step has the ratio 0.9, 0.7, 0.5 or 0.3.

    Raises:
        ValueError: ratios that are not numbers between slashes.
    """
    # Tables 2 and 4 are of an ITT x4, trained at 0.7, 0.7, 0.7.
    paper = elastic_rows() if steps == 3 else [ratios_key([share] * steps) for share in (0.9, 0.7, 0.5, 0.3)]
    keys = [ratios_key([0.0] * steps), ratios_key(trained), *paper, *(ratios_key(parse_ratios(text)) for text in asked)]
    return [parse_ratios(key) for key in dict.fromkeys(keys)]


@torch.no_grad()
def cross_entropy(model: ITTForCausalLM, sequences: HeldOut, batch_size: int = 4) -> float:
    """Return nats per predicted token over the sequences."""
    total, tokens = 0.0, 0
    both = (batches(part, batch_size, model.device) for part in (sequences.ids_N, sequences.labels_N))
    for ids_BS, labels_BS in zip(*both, strict=True):
        predicted = int((labels_BS[:, 1:] != IGNORED).sum())
        total += model(ids_BS, labels=labels_BS, with_logits=False).loss.item() * predicted
        tokens += predicted
    return total / tokens


def evaluate(
    model: ITTForCausalLM, to_set: HeldOut, to_check: HeldOut, token_ratios: Sequence[float], batch_size: int = 4
) -> Setting:
    """Return perplexity and FLOPs at one setting, with thresholds calibrated for it on ``to_set``."""
    decoder, S = Decoder.from_model_config(model.config.to_dict()), to_check.mean_length
    calibrate(model, to_set.ids_N, token_ratios, batch_size)
    model.set_thinking(token_ratios, selection='threshold')
    causal = math.exp(cross_entropy(model, to_check, batch_size))
    fractions = routed_fractions(model, to_check.ids_N, batch_size)
    model.set_thinking(token_ratios, selection='top_k')
    non_causal = math.exp(cross_entropy(model, to_check, batch_size))
    return Setting(
        ratios=ratios_key(token_ratios),
        paper_gflops=paper_flops(decoder, S, token_ratios) / 1e9,
        exact_gflops=exact_flops(decoder, S, token_ratios).total / 1e9,
        perplexity_threshold=causal,
        perplexity_top_k=non_causal,
        causal_gap=causal - non_causal,
        share_error=max((abs(x - token_ratios[step - 1]) for (_, step), x in fractions.items()), default=0.0),
    )


def measure(
    model: ITTForCausalLM, sequences: HeldOut, settings: Sequence[Sequence[float]], batch_size: int = 4
) -> list[Setting]:
    """Return every setting, the cheapest first; half of the sequences set the thresholds, half are evaluated."""
    to_set, to_check = sequences.halves()
    measured = [evaluate(model, to_set, to_check, ratios, batch_size) for ratios in track(settings, 'evaluating')]
    return sorted(measured, key=lambda setting: setting.exact_gflops)


def plot(settings: Sequence[Setting], trained: str) -> Figure:
    """Plot perplexity against the paper's FLOPs and the exact ones, for both kinds of routing (Figure 6, left).

    Labels name the trained setting and the best one at each cost. The setting without any step is in the table alone:
    its perplexity would press the others together.
    """
    settings = [setting for setting in settings if any(parse_ratios(setting.ratios))]
    best = {s.exact_gflops: s for s in sorted(settings, key=lambda s: -s.perplexity_threshold)}
    named = [s for s in settings if s.ratios == trained or s is best[s.exact_gflops]]
    figure = Figure(figsize=(9, 4.2), dpi=140, layout='constrained')
    panels = zip(figure.subplots(1, 2, sharey=True), ('paper_gflops', 'exact_gflops'), strict=True)
    for axis, flops in panels:
        for i, rule in enumerate(('threshold', 'top_k')):
            points = [(getattr(s, flops), getattr(s, f'perplexity_{rule}')) for s in settings]
            style = {**line_style(i + 1), 'linestyle': 'none'}
            axis.plot(*zip(*points, strict=True), label=f'selection: {rule}', markersize=5, **style)
        for setting in named:
            place = getattr(setting, flops), setting.perplexity_threshold
            weight = 'bold' if setting.ratios == trained else 'normal'
            axis.annotate(
                setting.ratios, place, xytext=(4, 4), textcoords='offset points', fontsize=6, fontweight=weight
            )
        axis.set_xlabel(f'GFLOPs of a forward pass, {flops.split("_")[0]} count', fontsize=9)
        tidy(axis, 'both')
        if flops == 'paper_gflops':
            axis.set_ylabel('perplexity', fontsize=9)
            axis.legend(fontsize=8, frameon=False, title=f'trained at {trained}', title_fontsize=8)
    return figure


def main(
    model_folder: Path,
    data: Path,
    ratios: list[str] | None = None,
    sequences: int | None = None,
    batch_size: int = 4,
    out: Path = Path('sweep'),
) -> None:
    """Evaluate the settings of Tables 2 and 4 with both kinds of routing, with thresholds calibrated for each."""
    with one_line_errors('sweep'):
        model = load_routed(model_folder)
        trained = list(model.config.token_ratios)
        asked = [checked_ratios(model.config, setting) for setting in settings_for(len(trained), trained, ratios or [])]
        rows = held_out(data, sequences, model_folder, model.config)
    settings = measure(model, rows, asked, batch_size)
    table_file, picture_file = (out.with_name(f'{out.name}.{kind}') for kind in ('csv', 'png'))
    names = [field.name for field in fields(Setting)]
    write_text(pd.DataFrame(map(asdict, settings), columns=names).to_csv(index=False), table_file)
    picture = BytesIO()
    plot(settings, ratios_key(trained)).savefig(picture, format='png')
    write_bytes(picture.getvalue(), picture_file)
    table = Table(
        *HEADINGS,
        title=f'{model_folder}, {len(rows.ids_N) // 2} sequences of {rows.mean_length} tokens, trained at {trained}',
    )
    for setting in settings:
        values = asdict(setting).values()
        table.add_row(*(value if isinstance(value, str) else f'{value:.3f}' for value in values))
    console = Console(width=140)
    console.print(table)
    console.print(f'{table_file}, {picture_file}', highlight=False)
