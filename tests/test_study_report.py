"""What a study says: the statistics, the report and its pictures, from tables made here; nothing is trained."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from common.pictures import save_coarsely
from conftest import REPO
from matplotlib.figure import Figure
from scipy import stats

from itt_composer.analysis.figure_style import to_array
from research.study import report
from research.study.figures import difference_curves, loss_curves
from research.study.paper_numbers import paper_numbers
from research.study.report import write_report
from research.study.results import COLUMNS, best_settings, read_table, write_table
from research.study.statistics import (
    SELECTIONS,
    Spread,
    by_seed,
    crossing,
    data_fractions,
    difference,
    differences,
    holm,
    of_shared_seeds,
)
from research.study.study_file import load_study

STUDIES = REPO / 'yamls' / 'studies'


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    save_coarsely(monkeypatch)


@pytest.fixture
def empty_pictures(monkeypatch):
    """For tests that read the report's text alone."""
    for name in ('loss_curves', 'difference_curves', 'steps_figure'):
        monkeypatch.setattr(report, name, lambda *_: Figure())


def synthetic(losses, stage='main', batches=(100, 200, 300)):
    """Runs whose loss falls along a line by 1 from the first evaluation to the last, ``losses[variant][seed]``."""
    rows = []
    for variant, per_seed in losses.items():
        for seed, loss in per_seed.items():
            for batch in batches:
                row = {
                    'study': 'headline_cpu', 'run': f'{variant}-{stage}-{seed}', 'stage': stage, 'variant': variant,
                    'setting': '', 'seed': seed, 'parameters': 1000, 'domain': 'all', 'batch': batch,
                    'tokens': batch * 10,
                    'paper_flops': batch * 1e9, 'exact_flops': batch * (2e9 if variant == 'itt_x4' else 1e9),
                    'loss_threshold': loss + (300 - batch) / 200, 'seconds': batch,
                    'loss_top_k': loss - 0.05 + (300 - batch) / 200 if variant == 'itt_x4' else None,
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


def losses_of(runs):
    """A row for each seed, a column for each variant."""
    return pd.DataFrame(runs)


def test_two_variants_are_a_paired_t_test():
    losses = losses_of({name: LOSSES[name] for name in ('llama', 'itt_x4')})
    found = difference(losses, 'itt_x4', 'llama', Spread.of(losses))
    test = stats.ttest_rel(losses.itt_x4, losses.llama)
    interval = test.confidence_interval(0.95)
    assert found.estimate == pytest.approx((-0.29 / 3, interval.low, interval.high)) and found.p == pytest.approx(
        test.pvalue
    )
    assert found.each == pytest.approx((-0.10, -0.08, -0.11))


def test_the_pooled_variance_is_that_of_a_two_way_analysis_of_variance():
    """Balanced: scipy's one-way F on losses centred by seed has the same squares, and S - 1 more degrees of freedom."""
    generator = np.random.default_rng(0)
    table = generator.normal(size=(5, 4)) + generator.normal(size=(5, 1)) * 10 + np.arange(4)
    spread = Spread.of(pd.DataFrame(table, columns=list('abcd')))
    assert spread.freedom == 4 * 3
    centred = table - table.mean(1, keepdims=True)
    between = 5 * centred.mean(0).var(ddof=1)
    within = between / stats.f_oneway(*centred.T).statistic
    assert spread.deviation**2 == pytest.approx(within * (20 - 4) / 12)


def test_intervals_cover_and_p_is_uniform_with_missing_runs():
    generator, covered, p = np.random.default_rng(1), 0, []
    for _ in range(200):
        table = pd.DataFrame(generator.normal(size=(5, 5)) + 9 * generator.normal(size=(5, 1)), columns=list('abcde'))
        table.loc[3:, 'b'] = table.loc[:1, 'c'] = math.nan
        found = difference(table, 'b', 'a', Spread.of(table))
        covered += found.estimate.low < 0 < found.estimate.high
        p.append(found.p)
    assert abs(covered / 200 - 0.95) < 0.03 and stats.kstest(p, 'uniform').pvalue > 0.01


def test_the_stored_controls_give_the_known_differences():
    """More layers at an embedding init std of 2.0, and ITT x4 on top of residual scaling."""
    table = read_table(REPO / 'research' / 'results' / 'controls_cpu' / 'results.csv')
    pairs = [('deep_std2', 'llama_std2'), ('itt_x4_threshold_residual_scale', 'llama')]
    (deep, thinking), _ = differences(table, pairs, 'loss_threshold')
    assert deep.estimate == pytest.approx((-0.024, -0.036, -0.0125), abs=6e-4)
    assert thinking.estimate == pytest.approx((-0.015, -0.027, -0.004), abs=6e-4)
    assert thinking.p == pytest.approx(0.012, abs=1e-3)


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, math.nan, 0.6]) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)


def test_seeds_that_only_one_variant_has_are_left_out():
    losses = by_seed(synthetic({**LOSSES, 'itt_x4': {17: 4.90, 18: 5.02}}))
    found = difference(losses, 'itt_x4', 'llama', Spread.of(losses))
    assert len(found.each) == 2 and losses.loc[18, 'itt_x4'] == 5.02
    # A model that routes no tokens has one loss under both selections.
    (non_causal,), _ = differences(synthetic(LOSSES), [('itt_x4', 'llama')], 'loss_top_k')
    assert non_causal.estimate.value == pytest.approx(-0.29 / 3 - 0.05)
    one = losses_of({'a': {1: 5.0}, 'b': {1: 5.1}})
    found = difference(one, 'b', 'a', Spread.of(one))
    assert found.estimate.value == pytest.approx(0.1) and math.isnan(found.p) and found.estimate.text() == '+0.1000'


def test_a_run_that_diverged_is_no_missing_one(tmp_path, empty_pictures):
    table = synthetic({**LOSSES, 'itt_x4': {17: math.nan, 18: 4.90, 19: 4.94}, 'loop_x4': {17: 4.0}})
    (found,), _ = differences(table, [('itt_x4', 'llama')], 'loss_threshold')
    assert (found.estimate.value, len(found.each)) == (math.inf, 3) and math.isnan(found.estimate.low)
    study = load_study(STUDIES / 'headline.yaml', ['variants.itt_x3=null', 'report.data_efficiency=null'])
    write_table(table[list(COLUMNS)], tmp_path / 'results.csv')
    text = write_report(study, tmp_path, tmp_path).read_text()
    assert '| itt_x4 minus llama | +inf |' in text and '| diverged (1 of 1) |' in text
    # In a sweep the mean over its seeds is no better for it, and a variant that always diverges has no best setting.
    runs = {('llama', 'high'): {16: 4.9, 17: math.nan}, ('llama', 'low'): {16: 5.0, 17: 5.0}}
    runs |= {('itt_x4', setting): {16: math.nan, 17: math.nan} for setting in ('high', 'low')}
    sweep = pd.concat(
        synthetic({variant: losses}, 'tuning').assign(setting=setting, run=lambda rows, s=setting: s + rows.run)
        for (variant, setting), losses in runs.items()
    )
    tuning = ['tuning.seeds=[16,17]', 'tuning.settings={high: {}, low: {}}']
    assert best_settings(sweep, load_study(STUDIES / 'headline.yaml', tuning).tuning) == {'llama': 'low'}


def test_means_that_stand_beside_one_another_are_of_the_same_seeds():
    table = synthetic({**LOSSES, 'llama': {**LOSSES['llama'], 20: 9.0}})
    assert by_seed(of_shared_seeds(table)).mean().to_dict() == by_seed(synthetic(LOSSES)).mean().to_dict()
    apart = synthetic({'llama': {17: 5.0}, 'itt_x4': {18: 5.0}})
    assert set(of_shared_seeds(apart).seed) == {17, 18}


def test_data_fractions():
    table = synthetic(LOSSES)
    # The curve falls by 0.5 in 100 batches: 0.1 lower at the end is 20 batches of 300 earlier.
    fractions = data_fractions(table, 'itt_x4', 'llama')
    assert list(fractions) == pytest.approx([280 / 300, 284 / 300, 278 / 300])
    assert data_fractions(table, 'loop_x4', 'llama').tolist() == [math.inf] * 3
    x, loss = np.array([1.0, 2.0, 3.0]), np.array([3.0, 1.0, 2.0])
    assert crossing(x, loss, 2.0) == 1.5 and crossing(x, loss, 3.5) == 1.0 and crossing(x, loss, 0.5) == math.inf


def test_the_report_is_made_from_the_stored_table_alone(tmp_path):
    sweep = synthetic({'llama': {16: 5.5}, 'itt_x4': {16: 5.4}}, 'tuning').assign(setting='high')
    better = synthetic({'llama': {16: 5.3}}, 'tuning').assign(setting='low', run='low')
    table = pd.concat([synthetic(LOSSES), sweep, better])
    tuning = ['tuning.seeds=[16]', 'tuning.settings={high: {}, low: {}}']
    study = load_study(
        STUDIES / 'headline.yaml',
        ['report.data_efficiency.variants=[loop_x4, itt_x4]', 'variants.itt_x3=null', *tuning],
    )
    # ITT lacks a run of its sweep: the best of what is there may not be its best.
    assert best_settings(table, study.tuning) == {'llama': 'low'}
    write_table(table[list(COLUMNS)], tmp_path / 'results.csv')
    environment = {'device': 'a processor', 'threads': 1, 'packages': {'torch': '2'}, 'revision': 'abc'}
    (tmp_path / 'manifest.json').write_text(json.dumps({'environments': [{'environment': environment, 'runs': [1]}]}))
    text = write_report(study, tmp_path, tmp_path / 'out').read_text()
    for part in ('5.0500 ± 0.0289', '-0.0967', 'a processor', '93.6 %', 'not reached', '56.8 %', 'itt_x2 (seeds 17, 18',
                 '**5.3000**', '42.1', '-0.09 (Section 4.2)', 'Holm’s correction', 'wiki'):  # fmt: skip
        assert part in text, part
    assert 'non-causal' in text and '| itt_x4 | 5.4000 |' in text and 'over the seeds that all variants have' in text
    for picture in ('curves', 'differences', 'steps'):
        assert (tmp_path / 'out' / f'{picture}.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ValueError, match='no results'):
        write_report(study, tmp_path / 'none', tmp_path / 'out')


def test_without_non_causal_losses_none_are_reported(tmp_path, empty_pictures):
    write_table(synthetic(LOSSES).assign(loss_top_k=math.nan)[list(COLUMNS)], tmp_path / 'results.csv')
    assert 'non-causal' not in write_report(load_study(STUDIES / 'headline.yaml'), tmp_path, tmp_path).read_text()


def test_an_arm_that_shares_no_seed_with_the_baseline_has_no_difference(tmp_path, empty_pictures):
    table = synthetic({**LOSSES, 'loop_x4': {16: 5.02}})
    write_table(table[list(COLUMNS)], tmp_path / 'results.csv')
    text = write_report(load_study(STUDIES / 'headline.yaml'), tmp_path, tmp_path / 'out').read_text()
    assert '| itt_x4 minus llama | **-0.0967 [' in text and 'loop_x4 minus llama' not in text and 'nan' not in text
    assert 'no seed is common to all' in text and 'Left out' not in text


def test_a_variant_that_the_study_file_lacks_is_named_and_does_not_change_the_others(tmp_path, empty_pictures):
    study, table = load_study(STUDIES / 'headline.yaml'), synthetic(LOSSES)
    write_table(table[list(COLUMNS)], tmp_path / 'results.csv')
    alone = write_report(study, tmp_path, tmp_path / 'out').read_text()
    write_table(pd.concat([table, synthetic({'itt_x5': {17: 4.0}})])[list(COLUMNS)], tmp_path / 'results.csv')
    text = write_report(study, tmp_path, tmp_path / 'out').read_text()
    line = '**Left out**, because the study file has no such variant: itt_x5.\n'
    assert line in text and text.replace(line, '') == alone


def test_pictures_hold_many_arms_with_long_names():
    variants = {f'itt_x4_causal,embedding_initializer_range={scale}.0': {17: 5 - scale / 100} for scale in range(11)}
    variants |= {'itt_x4': {17: 4.9}}
    table, baseline = synthetic(variants), next(iter(variants))
    one_rule = table.assign(loss_top_k=math.nan)
    differences = difference_curves(table, list(variants), baseline)
    assert [axis.get_title() for axis in differences.axes] == list(SELECTIONS.values())
    alone = difference_curves(one_rule, list(variants), baseline)
    assert [axis.get_title() for axis in alone.axes] == [SELECTIONS['loss_threshold']]
    for figure in (loss_curves(table, list(variants), 'A title'), differences, alone):
        to_array(figure)
        (legend,) = figure.legends
        assert set(variants) - {baseline} <= {text.get_text() for text in legend.get_texts()}
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
    assert numbers['headline']['itt_x4', 'loss minus loop_x4'] == (-0.4, 'Section 4.2')
    assert numbers['ablations']['without_routing', 'perplexity'] == (10.44, 'Table 3')
    assert numbers['elastic'] == {
        ('llama', 'perplexity'): (11.13, 'Table 2'),
        ('loop_x4', 'perplexity'): (10.78, 'Table 2'),
    }
