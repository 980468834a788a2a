"""The report of a study, from its stored tables alone: ``python -m research report STUDY [key=value ...]``.

Writes ``report.md`` and its pictures. No composer is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from itt_composer.paper.tables import elastic_rows, paper_numbers
from research.k_hop.data import floors
from research.study.figures import difference_curves, loss_curves, steps_figure
from research.study.results import ANSWERS, best_settings, final, read_table
from research.study.statistics import (
    Estimate,
    by_seed,
    data_shares,
    filled,
    loss_at_flops,
    of_shared_seeds,
    paired,
    paired_by_domain,
    rules_of,
    sharing_seeds,
)
from research.study.study_file import Study, Tuning, load_study

REPOSITORY = Path(__file__).resolve().parents[2]
STORED = REPOSITORY / 'research' / 'results'


def write_report(study: Study, results: Path, out: Path) -> Path:
    """``report.md`` and its pictures for the tables in ``results``; returns the page's path.

    Raises:
        ValueError: no ``results.csv`` there, or one without a finished main run.
    """
    stored = read_table(results / 'results.csv')
    table = stored[stored.arm.isin(study.arms)]
    others = sorted(set(stored.arm) - set(study.arms))
    parts = [f'# {study.title}', _what(study, table, others, results)]
    out.mkdir(parents=True, exist_ok=True)
    if (table.stage == 'main').any():
        arms = [arm for arm in study.arms if arm in set(filled(table).arm)]
        parts += [_final_losses(study, table, arms)]
        for baseline in study.report.get('baselines', []):
            if baseline in arms:
                parts.append(_differences(study, table, sharing_seeds(table, arms, baseline), baseline))
        parts += _efficiency(study, table, arms)
        parts.append('## Curves (Figure 4)\n\n![loss curves](curves.png)')
        loss_curves(table, arms, study.title).savefig(out / 'curves.png')
        for baseline in study.report.get('baselines', [])[:1]:
            if baseline in arms and len(compared := sharing_seeds(table, arms, baseline)) > 1:
                parts.append(f'![differences to {baseline}](differences.png)')
                difference_curves(table, compared, baseline).savefig(out / 'differences.png')
                parts.append(_domains(table, compared, baseline))
        if study.report.get('steps'):
            parts.append('## Steps (Figure 5)\n\n![loss against steps](steps.png)')
            steps_figure(table, study.report['steps']).savefig(out / 'steps.png')
    if (results / 'elastic.csv').is_file():
        parts.append(_elastic(pd.read_csv(results / 'elastic.csv')))
    if (results / ANSWERS).is_file():
        parts += answers(pd.read_csv(results / ANSWERS))
    if study.tuning and (table.stage == 'tuning').any():
        parts.append(_sweep(study.arms, study.tuning, table))
    page = out / 'report.md'
    page.write_text('\n\n'.join(part for part in parts if part) + '\n')
    return page


def _what(study: Study, table: pd.DataFrame, others: Sequence[str], results: Path) -> str:
    main = filled(table)
    seeds, missing = sorted(set(main.seed)), []
    for arm in study.arms:
        absent = [str(seed) for seed in study.seeds if seed not in set(main[main.arm == arm].seed)]
        if absent:
            missing.append(f'{arm} (seeds {", ".join(absent)})')
    lines = [f'Made from `results.csv` of the study `{study.name}` by `make study-report STUDY=...`.']
    if seeds:
        last = final(main)
        lines.append(
            f'Seeds {", ".join(map(str, seeds))}; {int(last.batch.max()):,} batches, {int(last.tokens.max()):,} tokens '
            'a run; losses in nats per token of the validation rows. A seed sets the initial weights and the order of '
            'the batches, so that runs of one seed are compared in pairs.'
        )
    manifest = results / 'manifest.json'
    for entry in json.loads(manifest.read_text())['environments'] if manifest.is_file() else []:
        environment = entry['environment'] or {}
        packages = environment.get('packages') or {}
        lines.append(
            f'{len(entry["runs"])} runs on {environment.get("device")} with {environment.get("threads")} thread(s), '
            f'torch {packages.get("torch")}, source {environment.get("revision")}.'
        )
    if missing:
        lines.append(f'**Not there yet**: {"; ".join(missing)}.')
    if others:
        lines.append(f'**Left out**, as the study file has no arm of the name: {", ".join(others)}.')
    return '\n'.join(lines)


def _final_losses(study: Study, table: pd.DataFrame, arms: Sequence[str]) -> str:
    shared, paper = of_shared_seeds(table), _paper(study)
    of_all = set(shared.groupby('arm').seed.nunique()) == {shared.seed.nunique()}
    last, ahead, causal = final(shared), by_seed(shared, 'loss_ahead'), by_seed(shared)
    plain = last[last.arm == arms[0]].exact_flops.mean()
    routed = set(table[(table.stage == 'main') & table.loss_ahead.notna()].arm)  # under their training rule too
    rows = []
    for arm in arms:
        own = last[last.arm == arm]
        loss, looking = Estimate.of(causal[arm].dropna()), Estimate.of(ahead[arm].dropna())
        row = {
            'arm': arm,
            'parameters': f'{int(own.parameters.iloc[0]):,}',
            f'training FLOPs, {arms[0]} = 1': f'{own.exact_flops.mean() / plain:.2f}',
            'loss, causal rule': _value(loss),
            'perplexity': f'{math.exp(loss.mean):.2f}',
            'loss, training rule': _value(looking) if arm in routed else '',
            'causal gap': f'{loss.mean - looking.mean:+.4f}' if arm in routed else '',
            'seconds': f'{own.seconds.mean():.0f}',
            'seeds': str(loss.n),
        }
        for (named, metric), (value, source) in paper.items():
            if metric.startswith(('loss', 'data')):
                continue
            row.setdefault(f'paper: {metric} ({source})', '')
            if named == arm:
                row[f'paper: {metric} ({source})'] = f'{value:g}'
        rows.append(row)
    over = (
        'the seeds that all arms have.'
        if of_all
        else 'each arm’s own seeds, as no seed is common to all; only the differences below compare arms.'
    )
    return f'## Final losses\n\nMean ± standard error over {over}\n\n{markdown(rows)}'


def _differences(study: Study, table: pd.DataFrame, arms: Sequence[str], baseline: str) -> str:
    parts, numbers, paper = [f'## Against {baseline}'], set(), _paper(study)
    for column, rule in rules_of(table).items():
        values = by_seed(table, column)
        rows = []
        for arm in arms:
            if arm == baseline:
                continue
            estimate = paired(table, arm, baseline, column)
            each = (values[arm] - values[baseline]).dropna()
            numbers.add(estimate.n)
            stated = paper.get((arm, f'loss less {baseline}'))
            rows.append(
                {
                    'arm': arm,
                    'difference': f'{estimate.mean:+.4f}',
                    '95 % interval': _interval(estimate),
                    'loss is': estimate.verdict,
                    'each seed': ', '.join(f'{value:+.4f}' for value in each),
                    'paper': f'{stated[0]:+g} ({stated[1]})' if stated else '',
                }
            )
        parts.append(f'Loss less that of {baseline}, paired by seed; {rule}:\n\n{markdown(rows)}')
    if numbers & {2, 3}:
        parts.append(
            'The intervals are Student’s t; with three seeds t = 4.30: 2.5 standard deviations of a single difference '
            'to each side. They are wide because three values say little of how much a difference varies; two say '
            'nothing of it, and a narrow interval from two is chance.'
        )
    if numbers and len(arms) > 2:
        parts.append('No interval is adjusted for the number of arms: one of twenty misses by chance.')
    return '\n\n'.join(parts)


def _efficiency(study: Study, table: pd.DataFrame, arms: Sequence[str]) -> list[str]:
    options = study.report.get('data_efficiency')
    if not options or options['baseline'] not in arms:
        return []
    baseline, paper, rows = options['baseline'], _paper(study), []
    for arm in sharing_seeds(table, [arm for arm in options['arms'] if arm in arms], baseline):
        shares = data_shares(table, arm, baseline)
        share = f'{100 * shares.mean():.1f} %' if shares.max() < math.inf else '–'
        equal = loss_at_flops(table, arm, baseline)
        stated = paper.get((arm, 'data share %'))
        rows.append(
            {
                'arm': arm,
                f'share of tokens to {baseline}’s final loss': share,
                'each seed': ', '.join(f'{100 * s:.1f} %' if s < math.inf else 'not reached' for s in shares),
                f'loss less {baseline}’s where it has spent as many FLOPs': f'{equal.mean:+.4f}',
                '95 % interval': _interval(equal),
                'paper: share of tokens': f'{stated[0]:g} % ({stated[1]})' if stated else '',
            }
        )
    note = (
        'Both columns read a point in the middle of a run, where the learning rate is still high; the other model’s '
        'last loss has the low rates behind it. They count against the arm. The fair comparison at equal FLOPs is a '
        'plain model with more layers (the readings study).'
    )
    return ['## Data and compute to the same loss\n\n' + markdown(rows) + '\n\n' + note] if rows else []


def _domains(table: pd.DataFrame, arms: Sequence[str], baseline: str) -> str:
    rows = []
    for arm in arms:
        estimates = paired_by_domain(table, arm, baseline) if arm != baseline else {}
        if estimates:
            rows.append({'arm': arm, **{d: f'{e.mean:+.4f} {_interval(e)}'.strip() for d, e in estimates.items()}})
    if not rows:
        return ''
    return f'### By domain\n\nLoss less that of {baseline}, causal rule, with 95 % interval.\n\n{markdown(rows)}'


def _sweep(arms: Sequence[str], tuning: Tuning, table: pd.DataFrame) -> str:
    sweep = final(table[table.stage == 'tuning'])
    means = sweep.pivot_table(index='arm', columns='setting', values='loss_causal')
    settings = [setting for setting in tuning.settings if setting in means]
    best, rows = best_settings(table, tuning), []
    for arm in [arm for arm in arms if arm in means.index]:
        cells = {s: '' if math.isnan(means.loc[arm, s]) else f'{means.loc[arm, s]:.4f}' for s in settings}
        if arm in best:
            cells[best[arm]] = f'**{cells[best[arm]]}**'
        rows.append({'arm': arm, **cells})
    seeds = ', '.join(map(str, sorted(set(sweep.seed))))
    return (
        f'## The sweep\n\nFinal loss of each arm at each setting (causal rule, seed {seeds}, '
        f'{int(sweep.tokens.max()):,} tokens a run); an arm’s best one, in bold where its sweep is whole, is what its '
        f'main runs use.\n\n{markdown(rows)}'
    )


def _elastic(table: pd.DataFrame) -> str:
    paper = {ratios: f'{row["perplexity"]:g}' for ratios, row in elastic_rows().items()}
    rows = []
    for (arm, ratios), part in table.groupby(['arm', 'ratios'], sort=False):
        rows.append(
            {
                'arm': arm,
                'ratios': str(ratios),
                'exact GFLOPs': f'{part.exact_gflops.mean():.3f}',
                'perplexity, causal rule': _value(Estimate.of(part.perplexity_threshold), 3),
                'perplexity, top-k rule': _value(Estimate.of(part.perplexity_top_k), 3),
                'paper: perplexity (Table 2)': paper.get(str(ratios), ''),
            }
        )
    note = 'On held-out rows, thresholds calibrated on others.'
    return f'## More and less thinking (Table 2)\n\n{note}\n\n{markdown(rows)}'


def answers(table: pd.DataFrame) -> list[str]:
    """Sections for what a token of each kind costs, from ``answers.csv`` of the hops study."""
    parts = ['## What a token costs, by its kind']
    for kind, floor in floors().items():
        of_kind = table[table.kind == kind]
        rows = [
            {'arm': arm, 'rule': rule}
            | {f'{hops} hops': ', '.join(f'{loss:.3f}' for loss in part.loss) for hops, part in own.groupby('hops')}
            | {'mean': f'{own.loss.mean():.3f}'}
            for (arm, rule), own in of_kind.sort_values('seed').groupby(['arm', 'rule'], sort=False)
        ]
        parts.append(
            f'### {kind.capitalize()}\n\nNats, each seed. No left-to-right model can be below {floor:.3f} on '
            f'average.\n\n{markdown(rows)}'
        )
    return parts


def _paper(study: Study) -> dict[tuple[str, str], tuple[float, str]]:
    """(arm, metric) to the paper's value and where it stands, for a study that names the paper's."""
    return paper_numbers().get(study.report.get('paper', ''), {})


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table; every row has the keys of the first."""
    lines = ['| ' + ' | '.join(rows[0]) + ' |', '|---' * len(rows[0]) + '|'] if rows else []
    return '\n'.join([*lines, *('| ' + ' | '.join(row.values()) + ' |' for row in rows)])


def _value(estimate: Estimate, digits: int = 4) -> str:
    error = '' if math.isnan(estimate.error) else f' ± {estimate.error:.{digits}f}'
    return f'{estimate.mean:.{digits}f}{error}'


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.half_width):
        return ''
    return f'[{estimate.mean - estimate.half_width:+.4f}, {estimate.mean + estimate.half_width:+.4f}]'


def main(
    study_file: Annotated[Path, typer.Argument(metavar='STUDY')],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar='key=value', help='those that the study was run with')
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help='Where results.csv is; research/results/<study> by default.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help='Where to write; beside the results by default.')] = None,
) -> None:
    """Write the report of a study again from its stored tables."""
    try:
        study = load_study(study_file, overrides or [])
        results = results or STORED / study.name
        print(write_report(study, results, out or results))
    except ValueError as error:
        raise SystemExit(f'study report: {error}') from None
