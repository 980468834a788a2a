"""``python -m research state-tracking report``: tables and figures from the stored tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from scipy import stats

from itt_composer.atomic import write_text
from itt_composer.one_line import one_line_errors
from research.estimate import Estimate
from research.state_tracking import pictures
from research.state_tracking.study import ELASTIC, LOSSES, ROUTING, Study, read_tables
from research.study.cells import markdown_table, p_cell
from research.study.statistics import CONFIDENCE, SIGNIFICANCE, Spread, difference, holm

STORED = Path(__file__).resolve().parents[1] / 'results' / 'state_tracking'
DENSE, DEEP, LOOP = 'dense_4', 'dense_7', 'loop_x4'
GATE_ERRORS = 4
"""The study can answer if ``DEEP`` is better than ``DENSE`` by as many standard errors."""
REACH_ACCURACY = 0.9


def kept_fraction(losses: pd.DataFrame, variant: str, spread: Spread) -> Estimate:
    """Return the fraction of the gain of Loop x4 over the dense baseline that the variant keeps.

    Args:
        losses: final losses, a row for each seed and a column for each variant.
        variant: a column.
        spread: their pooled variance; the interval is by the delta method.
    """
    own = losses[[DENSE, LOOP, variant]].dropna()
    gain, loop_gain = (own[DENSE] - own[variant]).mean(), (own[DENSE] - own[LOOP]).mean()
    kept = gain / loop_gain
    if not spread.freedom or not math.isfinite(kept):
        return Estimate(kept)
    # Gains have the variance 2 s^2 / n each, and as they share the dense baseline the covariance s^2 / n.
    error = spread.deviation * math.sqrt(2 / len(own) * (1 + kept**2 - kept)) / abs(loop_gain)
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, spread.freedom))
    return Estimate(kept, kept - half, kept + half)


def reach(accuracy_by_position: str) -> int:
    """Return the last position, counted from 0, with an accuracy of at least 90 %; -1 where there is none."""
    return max((i for i, x in enumerate(accuracy_by_position.split()) if float(x) >= REACH_ACCURACY), default=-1)


def gate(losses: pd.DataFrame, spread: Spread) -> str:
    """Return a sentence that says whether the positive control is far enough above the noise."""
    if not spread.freedom:
        return 'Positive control: not decided. It needs two seeds.'
    found = difference(losses, DEEP, DENSE, spread)
    errors = -found.estimate.value / (spread.deviation * math.sqrt(2 / max(1, len(found.each))))
    passed = 'passed' if errors >= GATE_ERRORS else 'not passed'
    below = f'{errors:.1f} standard errors below zero'
    return f'Positive control {passed}: {DEEP} minus {DENSE} is {found.estimate.text(3)}, {below}.'


def loss_table(study: Study, main: pd.DataFrame, losses: pd.DataFrame, spread: Spread) -> str:
    """Return a row for each variant: FLOPs, learning rate, loss of each seed, fraction kept of the Loop's gain."""
    flops, rows = main.groupby('variant').flops.first(), []
    for variant in losses:
        own = main[main.variant == variant].sort_values('seed')
        compared = variant not in (DENSE, LOOP) and {DENSE, LOOP} <= set(losses)
        rows.append(
            {
                'variant': f'`{variant}`',
                'FLOPs': f'{flops[variant] / flops[DENSE]:.2f}',
                'learning rate': f'{own.learning_rate.iloc[0]:g}',
                'loss of each seed': ', '.join(f'{loss:.3f}' for loss in own.loss),
                'mean': f'{own.loss.mean():.3f}',
                'reach': f'{own.reach.mean():.1f}',
                'kept': kept_fraction(losses, variant, spread).text(2) if compared else '',
            }
        )
    missing = {
        variant: sorted(set(study.seeds) - set(losses[variant].dropna().index) if variant in losses else study.seeds)
        for variant in study.variants
    }
    lines = [f'`{name}` (seeds {", ".join(map(str, seeds))})' for name, seeds in missing.items() if seeds]
    text = (
        'Loss in nats over all positions; threshold routing. FLOPs relative to `dense_4`, exact count at the nominal '
        'ratios. Reach: last position, counted from 0, with an accuracy of at least 90 %, mean over seeds. Kept: '
        'fraction of the gain of `loop_x4` over `dense_4`, with its 95 % interval.\n\n' + markdown_table(rows)
    )
    return text + (f'\n\nNot finished: {", ".join(lines)}.' if lines else '')


def difference_table(study: Study, losses: pd.DataFrame, baseline: str, spread: Spread) -> str:
    """Return the difference of each variant to the baseline, corrected for the number of all that are planned."""
    found = [difference(losses, variant, baseline, spread) for variant in losses if variant != baseline]
    rows, planned = [], len(study.variants) - 1
    for one, corrected in zip(found, holm([*(one.p for one in found), *[1.0] * (planned - len(found))]), strict=False):
        text = one.estimate.text(3)
        rows.append(
            {
                f'minus `{baseline}`': f'`{one.variant}`',
                'difference': f'**{text}**' if corrected < SIGNIFICANCE else text,
                'p, corrected': p_cell(corrected),
                'each seed': ', '.join(f'{value:+.3f}' for value in one.each),
            }
        )
    return markdown_table(rows)


def routing_table(routing: pd.DataFrame, main: pd.DataFrame) -> str:
    """Return what the routers of each run do: a row for each layer."""
    rows = []
    for (variant, seed, layer), own in routing.groupby(['variant', 'seed', 'layer'], sort=False):
        run = main[(main.variant == variant) & (main.seed == seed)]
        cells = {'variant': f'`{variant}`', 'seed': str(seed), 'loss': f'{run.loss.iloc[0]:.3f}', 'layer': str(layer)}
        for title, column, digits in (
            ('routed', 'fraction', 2), ('transposition', 'transposition', 2), ('cycle', 'cycle', 2),
            ('inverse', 'inverse', 2), ('gate', 'gate_mean', 2), ('logit std', 'logit_std', 2),
            ('between positions', 'logit_position_share', 2), ('routed again', 'routed_again', 2),
        ):  # fmt: skip
            cells[title] = ' '.join('–' if math.isnan(x) else f'{x:.{digits}f}' for x in own[column].astype(float))
        thresholds = np.array([[float(x) for x in curve.split()] for curve in own.threshold_curve])
        cells['drift'] = ' '.join(f'{x:+.2f}' for x in (thresholds[:, -1] - thresholds[:, -2]) / own.logit_std)
        rows.append(cells)
    text = (
        'One number for each step. Routed: fraction of all tokens, then of those of each generator. Between positions: '
        'part of the variance of the logits. Routed again: of the tokens that the step before routed. Drift: change of '
        'the threshold in the last fifth of the training, in standard deviations of the logits.'
    )
    return f'{text}\n\n{markdown_table(rows)}'


def write_report(study: Study, results: Path, out: Path) -> Path:
    """Write ``report.md`` and its figures; returns the page's path.

    Raises:
        ValueError: no main run of the dense baseline is finished, or the tables are of other settings.
    """
    tables = read_tables(results, study)
    main = tables[LOSSES].query('stage == "main"')
    if DENSE not in set(main.variant):
        raise ValueError(
            f'{results / LOSSES}: no finished main run of {DENSE}; run: python -m research state-tracking run'
        )
    main = main.assign(reach=main.accuracy_by_position.map(reach))
    losses = main.pivot(index='seed', columns='variant', values='loss')
    losses = losses[[variant for variant in study.variants if variant in losses]]
    spread = Spread.of(losses)
    parts = ['# State tracking', gate(losses, spread) if DEEP in losses else '', '## Losses']
    parts.append(loss_table(study, main, losses, spread))
    parts.append(
        f'## Differences\n\nNats, paired by seed, with 95 % intervals from one variance: standard deviation '
        f'{spread.deviation:.4f}, {spread.freedom} degrees of freedom. Bold: significant at 5 % after Holm’s '
        'correction for all planned comparisons of its table.'
    )
    parts += [difference_table(study, losses, name, spread) for name in study.settings['baselines'] if name in losses]
    out.mkdir(parents=True, exist_ok=True)
    drawn = {'positions': pictures.positions(study, main), 'reach': pictures.reach(main, list(losses))}
    if len(tables[ELASTIC]):
        drawn['elastic'] = pictures.elastic(study, tables[ELASTIC], main)
    for name, figure in drawn.items():
        figure.savefig(out / f'{name}.png')
        parts.append(f'![{name}]({name}.png)')
    if len(tables[ROUTING]):
        parts.append('## Routing\n\n' + routing_table(tables[ROUTING], main))
    write_text('\n\n'.join(part for part in parts if part) + '\n', out / 'report.md')
    return out / 'report.md'


def main(
    results: Annotated[Path, typer.Option(help='Folder of the tables.')] = STORED,
    out: Annotated[Path, typer.Option(help='Folder to write to.')] = STORED,
) -> None:
    """Write the tables and figures of the state-tracking study."""
    with one_line_errors('state-tracking report'):
        print(write_report(Study(), results, out))
