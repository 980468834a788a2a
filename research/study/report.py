"""The report of a study from its stored tables alone: ``python -m research report STUDY [key=value ...]``.

Writes ``report.md`` and its figures. No composer is imported.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from itt_composer.atomic import write_text
from itt_composer.one_line import one_line_errors
from itt_composer.paper.tables import elastic_rows
from research.k_hop.data import lowest_losses
from research.study.cells import markdown_table, mean_cell, p_cell
from research.study.figures import difference_curves, loss_curves, steps_figure
from research.study.paper_numbers import paper_numbers
from research.study.results import ANSWERS, best_settings, final, read_table
from research.study.statistics import (
    SIGNIFICANCE,
    by_domain,
    by_seed,
    data_fractions,
    differences,
    filled,
    holm,
    of_shared_seeds,
    selections_of,
    sharing_seeds,
)
from research.study.study_file import Study, Tuning, load_study

STORED = Path(__file__).resolve().parents[2] / 'research' / 'results'


def write_report(study: Study, results: Path, out: Path) -> Path:
    """Write ``report.md`` and its figures for the tables in ``results``; returns the page's path.

    Raises:
        ValueError: ``results.csv`` is missing, or has no finished main run.
    """
    stored = read_table(results / 'results.csv')
    table = stored[stored.variant.isin(study.variants)]
    others = sorted(set(stored.variant) - set(study.variants))
    parts = [f'# {study.title}', _what(study, table, others, results)]
    out.mkdir(parents=True, exist_ok=True)
    if (table.stage == 'main').any():
        variants = [variant for variant in study.variants if variant in set(filled(table).variant)]
        baselines = [baseline for baseline in study.report.get('baselines', []) if baseline in variants]
        parts.append(_final_losses(study, table, variants))
        comparisons = [tuple(pair) for pair in study.report.get('comparisons', []) if set(pair) <= set(variants)]
        if comparisons:
            parts.append(_differences(study, table, comparisons, 'Comparisons'))
        for baseline in baselines:
            pairs = [(v, baseline) for v in sharing_seeds(table, variants, baseline) if v != baseline]
            parts.append(_differences(study, table, pairs, f'Compared with {baseline}'))
        parts += _efficiency(study, table, variants)
        parts.append('## Curves (Figure 4)\n\n![loss curves](curves.png)')
        loss_curves(table, variants, study.title).savefig(out / 'curves.png')
        for baseline in baselines[:1]:
            if len(compared := sharing_seeds(table, variants, baseline)) > 1:
                parts.append(f'![differences to {baseline}](differences.png)')
                difference_curves(table, compared, baseline).savefig(out / 'differences.png')
                parts.append(_domains(table, [v for v in compared if v != baseline], baseline))
        if study.report.get('steps'):
            parts.append('## Steps\n\n![loss against steps](steps.png)')
            steps_figure(table, study.report['steps']).savefig(out / 'steps.png')
    if (results / 'elastic.csv').is_file():
        parts.append(_elastic(pd.read_csv(results / 'elastic.csv')))
    if (results / ANSWERS).is_file():
        parts += answers(pd.read_csv(results / ANSWERS))
    if study.tuning and (table.stage == 'tuning').any():
        parts.append(_sweep(study.variants, study.tuning, table))
    write_text('\n\n'.join(part for part in parts if part) + '\n', out / 'report.md')
    return out / 'report.md'


def _what(study: Study, table: pd.DataFrame, others: Sequence[str], results: Path) -> str:
    main = filled(table)
    seeds, missing = sorted(set(main.seed)), []
    for variant in study.variants:
        absent = [str(seed) for seed in study.seeds if seed not in set(main[main.variant == variant].seed)]
        if absent:
            missing.append(f'{variant} (seeds {", ".join(absent)})')
    lines = [f'Made from `results.csv` of the study `{study.name}`.']
    if seeds:
        last = final(main)
        lines.append(
            f'Seeds {", ".join(map(str, seeds))}; {int(last.batch.max()):,} batches, {int(last.tokens.max()):,} tokens '
            'per run; losses in nats per token of the validation sequences. A seed sets the initial weights and the '
            'order of the batches, so runs of one seed are compared in pairs.'
        )
    manifest = results / 'manifest.json'
    places: Counter[str] = Counter()
    for entry in json.loads(manifest.read_text())['environments'] if manifest.is_file() else []:
        environment = entry['environment'] or {}
        torch = (environment.get('packages') or {}).get('torch')
        place = f'{environment.get("device")}, {environment.get("threads")} thread(s), torch {torch}'
        places[place] += len(entry['runs'])
    lines += [f'{count} runs on {place}.' for place, count in places.items()]
    if missing:
        lines.append(f'**Missing**: {"; ".join(missing)}.')
    if others:
        lines.append(f'**Left out**, because the study file has no such variant: {", ".join(others)}.')
    return '\n'.join(lines)


def _final_losses(study: Study, table: pd.DataFrame, variants: Sequence[str]) -> str:
    shared, paper = of_shared_seeds(table), _paper(study)
    of_all = set(shared.groupby('variant').seed.nunique()) == {shared.seed.nunique()}
    last, top_k, threshold = final(shared), by_seed(shared, 'loss_top_k'), by_seed(shared)
    baseline_flops = last[last.variant == variants[0]].exact_flops.mean()
    routed = set(table[(table.stage == 'main') & table.loss_top_k.notna()].variant)
    rows = []
    for variant in variants:
        own = last[last.variant == variant]
        loss, non_causal = threshold[variant].dropna(), top_k[variant].dropna()
        diverged = not math.isfinite(loss.mean() + non_causal.mean())
        row = {
            'variant': variant,
            'parameters': f'{int(own.parameters.iloc[0]):,}',
            f'training FLOPs, {variants[0]} = 1': f'{own.exact_flops.mean() / baseline_flops:.2f}',
            'loss, threshold': mean_cell(loss),
            'perplexity': '' if diverged else f'{math.exp(loss.mean()):.2f}',
            'loss, training selection': mean_cell(non_causal) if variant in routed else '',
            'causal gap': f'{loss.mean() - non_causal.mean():+.4f}' if variant in routed and not diverged else '',
            'seconds': f'{own.seconds.mean():.0f}',
            'seeds': str(len(loss)),
        }
        for (named, metric), (value, source) in paper.items():
            if metric.startswith(('loss', 'data')):
                continue
            row.setdefault(f'paper: {metric} ({source})', '')
            if named == variant:
                row[f'paper: {metric} ({source})'] = f'{value:g}'
        rows.append(row)
    over = (
        'the seeds that all variants have.'
        if of_all
        else 'each variant’s own seeds, as no seed is common to all; compare variants by the differences below only.'
    )
    return f'## Final losses\n\nMean ± standard error over {over}\n\n{markdown_table(rows)}'


def _differences(study: Study, table: pd.DataFrame, pairs: Sequence[tuple[str, ...]], title: str) -> str:
    parts, paper = [f'## {title}'], _paper(study)
    for column, selection in selections_of(table).items():
        found, spread = differences(table, [(a, b) for a, b in pairs], column)
        rows = []
        for of_pair, corrected in zip(found, holm([one.p for one in found]), strict=True):
            stated = paper.get((of_pair.variant, f'loss minus {of_pair.baseline}'))
            text = of_pair.estimate.text()
            rows.append(
                {
                    'A minus B': f'{of_pair.variant} minus {of_pair.baseline}',
                    'difference [95 % interval]': f'**{text}**' if corrected < SIGNIFICANCE else text,
                    'p': p_cell(of_pair.p),
                    'p, corrected': p_cell(corrected),
                    'each seed': ', '.join(f'{value:+.4f}' for value in of_pair.each),
                    'paper': f'{stated[0]:+g} ({stated[1]})' if stated else '',
                }
            )
        method = (
            f'Student’s t with one variance for all variants: the residual of variant + seed, standard deviation '
            f'{spread.deviation:.4f}, {spread.freedom} degrees of freedom. Bold: significant at 5 % after Holm’s '
            f'correction for the {len(rows)} comparisons of this table.'
            if spread.freedom
            else 'One seed, so no intervals.'
        )
        parts.append(f'Final loss in nats, paired by seed; {selection}. {method}\n\n{markdown_table(rows)}')
    return '\n\n'.join(parts)


def _efficiency(study: Study, table: pd.DataFrame, variants: Sequence[str]) -> list[str]:
    options = study.report.get('data_efficiency')
    if not options or options['baseline'] not in variants:
        return []
    baseline, paper, rows = options['baseline'], _paper(study), []
    for variant in sharing_seeds(table, [v for v in options['variants'] if v in variants], baseline):
        fractions = data_fractions(table, variant, baseline)
        stated = paper.get((variant, 'data share %'))
        rows.append(
            {
                'variant': variant,
                f'tokens to {baseline}’s final loss': (
                    f'{100 * fractions.mean():.1f} %' if fractions.max() < math.inf else '–'
                ),
                'each seed': ', '.join(f'{100 * f:.1f} %' if f < math.inf else 'not reached' for f in fractions),
                'paper': f'{stated[0]:g} % ({stated[1]})' if stated else '',
            }
        )
    note = (
        'Upper bounds: the loss of the variant is read in the middle of its run, at a high learning rate, and that of '
        'the baseline at the end, at a low one.'
    )
    return ['## Data to the same loss\n\n' + markdown_table(rows) + '\n\n' + note] if rows else []


def _domains(table: pd.DataFrame, variants: Sequence[str], baseline: str) -> str:
    rows: dict[str, dict[str, str]] = {}
    for domain, found in by_domain(table, variants, baseline).items():
        for one in found:
            rows.setdefault(one.variant, {'variant': one.variant})[domain] = one.estimate.text()
    if not rows:
        return ''
    note = f'Loss minus that of {baseline}, threshold routing, 95 % interval, one variance for each domain.'
    return f'### By domain\n\n{note} Not corrected for their number.\n\n{markdown_table(list(rows.values()))}'


def _sweep(variants: Sequence[str], tuning: Tuning, table: pd.DataFrame) -> str:
    sweep = final(table[table.stage == 'tuning']).fillna({'loss_threshold': math.inf})
    means = sweep.pivot_table(index='variant', columns='setting', values='loss_threshold')
    settings = [setting for setting in tuning.settings if setting in means]
    best, rows = best_settings(table, tuning), []
    for variant in [variant for variant in variants if variant in means.index]:
        losses = {s: means.loc[variant, s] for s in settings}
        cells = {s: '' if math.isnan(x) else 'diverged' if x == math.inf else f'{x:.4f}' for s, x in losses.items()}
        if variant in best:
            cells[best[variant]] = f'**{cells[best[variant]]}**'
        rows.append({'variant': variant, **cells})
    seeds = ', '.join(map(str, sorted(set(sweep.seed))))
    return (
        f'## Sweep\n\nFinal loss of each variant at each setting (threshold routing, seed {seeds}, '
        f'{int(sweep.tokens.max()):,} tokens per run). The main runs use the best setting, in bold where the sweep of '
        f'the variant is complete.\n\n{markdown_table(rows)}'
    )


def _elastic(table: pd.DataFrame) -> str:
    paper, rows = elastic_rows(), []
    for (variant, ratios), part in table.groupby(['variant', 'ratios'], sort=False):
        rows.append(
            {
                'variant': str(variant),
                'token ratios': str(ratios),
                'exact GFLOPs': f'{part.exact_gflops.mean():.3f}',
                'perplexity, threshold': f'{part.perplexity_threshold.mean():.3f}',
                'perplexity, top-k': f'{part.perplexity_top_k.mean():.3f}',
                'paper: perplexity (Table 2)': str(paper.get(str(ratios), {}).get('perplexity', '')),
            }
        )
    note = 'On held-out sequences; thresholds calibrated on others.'
    return f'## Other token ratios at test time (Table 2)\n\n{note}\n\n{markdown_table(rows)}'


def answers(table: pd.DataFrame) -> list[str]:
    """Return sections for the loss of each kind of token, from ``answers.csv`` of the k-hop study."""
    parts = ['## Loss of each kind of token']
    for kind, lowest in lowest_losses().items():
        of_kind = table[table.kind == kind]
        rows = [
            {'variant': str(variant), 'selection': str(selection)}
            | {f'{hops} hops': ', '.join(f'{loss:.3f}' for loss in part.loss) for hops, part in own.groupby('hops')}
            | {'mean': f'{own.loss.mean():.3f}'}
            for (variant, selection), own in of_kind.sort_values('seed').groupby(['variant', 'selection'], sort=False)
        ]
        parts.append(
            f'### {kind.capitalize()}\n\nNats, each seed. The lowest possible mean of a left-to-right model is '
            f'{lowest:.3f}.\n\n{markdown_table(rows)}'
        )
    return parts


def _paper(study: Study) -> Mapping[tuple[str, str], tuple[float, str]]:
    """Return (variant, metric) to the paper's value and its source, for a study that names the paper's."""
    return paper_numbers().get(study.report.get('paper', ''), {})


def main(
    study_file: Annotated[Path, typer.Argument(metavar='STUDY', help='yamls/studies/headline.yaml, ...')],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar='key=value', help='The overrides that the study was run with.')
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help='Folder of results.csv; research/results/<study> by default.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help='Folder to write to; that of the results by default.')] = None,
) -> None:
    """Write the report of a study again from its stored tables."""
    with one_line_errors('report'):
        study = load_study(study_file, overrides or [])
        results = results or STORED / study.name
        print(write_report(study, results, out or results))
