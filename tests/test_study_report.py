"""What a study says: the statistics, the report and its pictures, from tables made here; nothing is trained."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from conftest import REPO
from scipy import stats

from itt_composer.analysis.figure_style import to_array
from itt_composer.paper.tables import paper_numbers
from research.study.figures import difference_curves, loss_curves
from research.study.report import write_report
from research.study.results import COLUMNS, best_settings, write_table
from research.study.statistics import (
    RULES,
    Estimate,
    by_seed,
    crossing,
    data_shares,
    loss_at_flops,
    of_shared_seeds,
    paired,
)
from research.study.study_file import load_study

STUDIES = REPO / 'yamls' / 'studies'


def synthetic(losses, stage='main', batches=(100, 200, 300)):
    """Runs whose loss falls along a line by 1 from the first evaluation to the last, ``losses[arm][seed]``."""
    rows = []
    for arm, per_seed in losses.items():
        for seed, loss in per_seed.items():
            for batch in batches:
                row = {
                    'study': 'headline_cpu', 'run': f'{arm}-{stage}-{seed}', 'stage': stage, 'arm': arm, 'setting': '',
                    'seed': seed, 'parameters': 1000, 'domain': 'all', 'batch': batch, 'tokens': batch * 10,
                    'paper_flops': batch * 1e9, 'exact_flops': batch * (2e9 if arm == 'itt_x4' else 1e9),
                    'loss_causal': loss + (300 - batch) / 200, 'seconds': batch,
                    'loss_ahead': loss - 0.05 + (300 - batch) / 200 if arm == 'itt_x4' else None,
                    'loss_train': loss + 1,
                }  # fmt: skip
                rows.append(row)
            rows.append({**row, 'domain': 'wiki'})
    return pd.DataFrame(rows)


LOSSES = {
    'llama': {17: 5.00, 18: 5.10, 19: 5.05},
    'loop_x4': {17: 5.02, 18: 5.11, 19: 5.09},
    'itt_x4': {17: 4.90, 18: 5.02, 19: 4.94},
}


def test_differences_are_paired_and_their_interval_is_students():
    table = synthetic(LOSSES)
    difference = paired(table, 'itt_x4', 'llama')
    test = stats.ttest_rel(list(LOSSES['itt_x4'].values()), list(LOSSES['llama'].values()))
    interval = test.confidence_interval(0.95)
    assert difference.mean == pytest.approx(-0.29 / 3)
    assert (difference.mean - difference.half_width, difference.mean + difference.half_width) == pytest.approx(
        (interval.low, interval.high)
    )
    assert difference.verdict == 'lower' and paired(table, 'loop_x4', 'llama').verdict == 'not told from none'
    # A model that routes nothing has one loss under both rules.
    assert paired(table, 'itt_x4', 'llama', 'loss_ahead').mean == pytest.approx(-0.29 / 3 - 0.05)
    # Seeds that only one of them has are left out.
    fewer = table[~((table.arm == 'itt_x4') & (table.seed == 19))]
    assert paired(fewer, 'itt_x4', 'llama').n == 2
    assert by_seed(fewer).loc[18, 'itt_x4'] == 5.02
    one = Estimate.of(np.array([0.1]))
    assert one.mean == 0.1 and math.isnan(one.half_width) and one.verdict == 'too few seeds to say'


def test_a_run_that_diverged_is_no_missing_one(tmp_path):
    table = synthetic({**LOSSES, 'itt_x4': {17: 4.90, 18: math.nan, 19: 4.94}, 'loop_x4': {17: 4.0}})
    difference = paired(table, 'itt_x4', 'llama')
    assert (difference.mean, difference.n, difference.verdict) == (math.inf, 3, 'a run diverged')
    study = load_study(STUDIES / 'headline_cpu.yaml', ['arms.itt_x3=null', 'report.data_efficiency=null'])
    write_table(table[list(COLUMNS)], tmp_path / 'results.csv')
    assert '| itt_x4 | +inf |  | a run diverged |' in write_report(study, tmp_path, tmp_path).read_text()
    # In a sweep the mean over its seeds is no better for it, and an arm that always diverges has no best setting.
    runs = {('llama', 'high'): {16: 4.9, 17: math.nan}, ('llama', 'low'): {16: 5.0, 17: 5.0}}
    runs |= {('itt_x4', setting): {16: math.nan, 17: math.nan} for setting in ('high', 'low')}
    sweep = pd.concat(
        synthetic({arm: losses}, 'tuning').assign(setting=setting, run=lambda rows, s=setting: s + rows.run)
        for (arm, setting), losses in runs.items()
    )
    tuning = ['tuning.seeds=[16,17]', 'tuning.settings={high: {}, low: {}}']
    assert best_settings(sweep, load_study(STUDIES / 'headline_cpu.yaml', tuning).tuning) == {'llama': 'low'}


def test_means_that_stand_beside_one_another_are_of_the_same_seeds():
    table = synthetic({**LOSSES, 'llama': {**LOSSES['llama'], 20: 9.0}})
    assert by_seed(of_shared_seeds(table)).mean().to_dict() == by_seed(synthetic(LOSSES)).mean().to_dict()
    apart = synthetic({'llama': {17: 5.0}, 'itt_x4': {18: 5.0}})
    assert set(of_shared_seeds(apart).seed) == {17, 18}


def test_data_shares_and_equal_flops():
    table = synthetic(LOSSES)
    # The curve falls by 0.5 in 100 batches: 0.1 lower at the end is 20 batches of 300 earlier.
    shares = data_shares(table, 'itt_x4', 'llama')
    assert list(shares) == pytest.approx([280 / 300, 284 / 300, 278 / 300])
    assert data_shares(table, 'loop_x4', 'llama').tolist() == [math.inf] * 3
    # Half way through, itt_x4 has spent what llama spends in all: at batch 150, 0.75 above its end.
    assert loss_at_flops(table, 'itt_x4', 'llama').mean == pytest.approx(-0.29 / 3 + 0.75)
    x, loss = np.array([1.0, 2.0, 3.0]), np.array([3.0, 1.0, 2.0])
    assert crossing(x, loss, 2.0) == 1.5 and crossing(x, loss, 3.5) == 1.0 and crossing(x, loss, 0.5) == math.inf


def test_the_report_is_made_from_the_stored_table_alone(tmp_path):
    sweep = synthetic({'llama': {16: 5.5}, 'itt_x4': {16: 5.4}}, 'tuning').assign(setting='high')
    better = synthetic({'llama': {16: 5.3}}, 'tuning').assign(setting='low', run='low')
    table = pd.concat([synthetic(LOSSES), sweep, better])
    tuning = ['tuning.seeds=[16]', 'tuning.settings={high: {}, low: {}}']
    study = load_study(
        STUDIES / 'headline_cpu.yaml', ['report.data_efficiency.arms=[loop_x4, itt_x4]', 'arms.itt_x3=null', *tuning]
    )
    # ITT lacks a run of its sweep: the best of what is there may not be its best.
    assert best_settings(table, study.tuning) == {'llama': 'low'}
    write_table(table[list(COLUMNS)], tmp_path / 'results.csv')
    environment = {'device': 'a processor', 'threads': 1, 'packages': {'torch': '2'}, 'revision': 'abc'}
    (tmp_path / 'manifest.json').write_text(json.dumps({'environments': [{'environment': environment, 'runs': [1]}]}))
    text = write_report(study, tmp_path, tmp_path / 'out').read_text()
    for part in ('5.0500 ± 0.0289', '-0.0967', 'a processor', '93.6 %', 'not reached', '56.8 %', 'itt_x2 (seeds 17, 18',
                 '**5.3000**', '42.1', '-0.09 (Section 4.2)', 't = 4.30', 'one of twenty', 'wiki'):  # fmt: skip
        assert part in text, part
    assert 'looks ahead' in text and '| itt_x4 | 5.4000 |' in text and 'over the seeds that all arms have' in text
    write_table(table.assign(loss_ahead=math.nan)[list(COLUMNS)], tmp_path / 'results.csv')
    assert 'looks ahead' not in write_report(study, tmp_path, tmp_path / 'out').read_text()
    for picture in ('curves', 'differences', 'steps'):
        assert (tmp_path / 'out' / f'{picture}.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ValueError, match='no results'):
        write_report(study, tmp_path / 'none', tmp_path / 'out')


def test_an_arm_that_shares_no_seed_with_the_baseline_has_no_difference(tmp_path):
    table = synthetic({**LOSSES, 'loop_x4': {16: 5.02}})
    write_table(table[list(COLUMNS)], tmp_path / 'results.csv')
    text = write_report(load_study(STUDIES / 'headline_cpu.yaml'), tmp_path, tmp_path / 'out').read_text()
    assert '| itt_x4 | -0.0967 |' in text and '| loop_x4 | +' not in text and 'nan' not in text
    assert 'no seed is common to all' in text and 'Left out' not in text


def test_an_arm_that_the_study_file_lacks_is_named_and_does_not_change_the_others(tmp_path):
    study, table = load_study(STUDIES / 'headline_cpu.yaml'), synthetic(LOSSES)
    write_table(table[list(COLUMNS)], tmp_path / 'results.csv')
    alone = write_report(study, tmp_path, tmp_path / 'out').read_text()
    write_table(pd.concat([table, synthetic({'itt_x5': {17: 4.0}})])[list(COLUMNS)], tmp_path / 'results.csv')
    text = write_report(study, tmp_path, tmp_path / 'out').read_text()
    line = '**Left out**, as the study file has no arm of the name: itt_x5.\n'
    assert line in text and text.replace(line, '') == alone


def test_pictures_hold_many_arms_with_long_names():
    arms = {f'itt_x4_causal,embedding_initializer_range={scale}.0': {17: 5 - scale / 100} for scale in range(11)}
    arms |= {'itt_x4': {17: 4.9}}
    table, baseline = synthetic(arms), next(iter(arms))
    one_rule = table.assign(loss_ahead=math.nan)
    differences = difference_curves(table, list(arms), baseline)
    assert [axis.get_title() for axis in differences.axes] == list(RULES.values())
    alone = difference_curves(one_rule, list(arms), baseline)
    assert [axis.get_title() for axis in alone.axes] == [RULES['loss_causal']]
    for figure in (loss_curves(table, list(arms), 'A title'), differences, alone):
        to_array(figure)
        (legend,) = figure.legends
        assert set(arms) - {baseline} <= {text.get_text() for text in legend.get_texts()}
        for part in (legend, *(axis.yaxis.label for axis in figure.axes)):
            box = part.get_window_extent()
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1 and 0 <= box.y0 <= box.y1 <= figure.bbox.y1, part
        # The legend leaves the panels room.
        assert sum(axis.get_window_extent().width for axis in figure.axes) > 0.4 * figure.bbox.width


def test_the_papers_numbers():
    """Read off the paper's pages, one of each kind."""
    numbers = paper_numbers()
    assert numbers['headline']['itt_x4', 'accuracy %'] == (42.1, 'Table 1')
    assert numbers['headline']['loop_x4', 'TFLOPs of a forward pass'] == (4.70, 'Table 1')
    assert numbers['headline']['itt_x4', 'data share %'] == (56.8, 'Section 4.2')
    assert numbers['ablations']['without_routing', 'perplexity'] == (10.44, 'Table 3')
    assert numbers['elastic'] == {
        ('llama', 'perplexity'): (11.13, 'Table 2'),
        ('loop_x4', 'perplexity'): (10.78, 'Table 2'),
    }
