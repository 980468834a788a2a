"""State tracking: labels that are right, runs that repeat and continue, a report from the stored tables."""

import itertools
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from common.locked import in_use
from common.pictures import save_coarsely

from research.state_tracking import command, task
from research.state_tracking.report import kept_fraction, reach, write_report
from research.state_tracking.study import KEYS, LOSSES, ROUTING, Run, Study, read_tables
from research.state_tracking.train import run_rows
from research.study.statistics import Spread


def matrix(p):
    """The permutation as a matrix that takes e_i to e_p(i)."""
    return np.eye(len(p), dtype=int)[:, list(np.argsort(p))].T


def test_labels_are_the_products_of_permutation_matrices():
    """Another route than index composition: matrices multiplied, and found among all 120."""
    of_state = {matrix(p).tobytes(): i for i, p in enumerate(itertools.permutations(range(5)))}
    generators = [matrix(p) for p in ((1, 0, 2, 3, 4), (1, 2, 3, 4, 0), (4, 0, 1, 2, 3))]
    assert len(of_state) == len(task.STATES) == 120
    x_BS, y_BS = task.sequences(20, 24, torch.Generator().manual_seed(0))
    for inputs, labels in zip(x_BS.tolist(), y_BS.tolist(), strict=True):
        product = np.eye(5, dtype=int)
        for g, label in zip(inputs, labels, strict=True):
            product = product @ generators[g]
            assert of_state[np.ascontiguousarray(product).tobytes()] == label


@pytest.fixture
def tiny(monkeypatch):
    """The study at a size that trains in a moment, in this process."""

    class Tiny(Study):
        def __init__(self, *args):
            super().__init__(*args)
            self.settings['model'] |= {'hidden_size': 16, 'intermediate_size': 16, 'max_position_embeddings': 6}
            self.settings['training'] |= {'batch_size': 4, 'batches': 4}
            self.settings['tuning'] |= {'batches': 2, 'learning_rates': [0.001, 0.01]}
            self.settings['evaluation'] |= {'sequences': 8}

    save_coarsely(monkeypatch)
    started = []

    def train_here(study, run):
        started.append(run)
        return run_rows(study, run)

    monkeypatch.setattr(command, 'rows_of', train_here)
    monkeypatch.setattr(command, 'ProcessPoolExecutor', lambda workers, _: ThreadPoolExecutor(workers))
    return Tiny, started


def test_a_run_repeats_to_the_last_digit(tiny):
    first, again = (run_rows(tiny[0](), Run('main', 'itt_delta', 0, 0.01)) for _ in range(2))
    for rows in (first, again):
        del rows[LOSSES][0]['cpu_seconds']
    # As text, in which NaN equals NaN.
    assert str(first) == str(again)
    assert first[LOSSES][0]['loss'] != run_rows(tiny[0](), Run('tuning', 'itt_delta', 1, 0.01))[LOSSES][0]['loss']


def test_the_command_tunes_then_trains_and_continues(tiny, tmp_path):
    study, started = tiny[0](['dense_4', 'itt_delta'], [0]), tiny[1]
    command.run_all(study, tmp_path, 1)
    assert [(run.stage, run.variant) for run in started] == [
        *[('tuning', 'dense_4')] * 2, *[('tuning', 'itt_delta')] * 2, ('main', 'dense_4'), ('main', 'itt_delta')
    ]  # fmt: skip
    losses = read_tables(tmp_path, study)[LOSSES]
    tuned = losses[(losses.stage == 'tuning') & (losses.variant == 'itt_delta')]
    best = tuned.learning_rate[tuned.loss.idxmin()]
    assert losses[losses.stage == 'main'].set_index('variant').learning_rate['itt_delta'] == best
    # As after a stop between a run's tables: its losses are missing, and its rows of the others are not kept twice.
    losses[:-1].to_csv(tmp_path / LOSSES, index=False)
    started.clear()
    command.run_all(study, tmp_path, 2)
    assert [run.variant for run in started] == ['itt_delta']
    tables = read_tables(tmp_path, study)
    assert not tables[ROUTING].duplicated([*KEYS, 'layer', 'step']).any() and len(tables[ROUTING]) == 6
    assert tables[LOSSES].loss.tolist() == pytest.approx(losses.loss.tolist())


def test_a_digest_of_digits_is_read_as_text(tmp_path, monkeypatch):
    study = Study()
    monkeypatch.setattr(study, 'digest', lambda variant: '01234567')
    pd.DataFrame([{**dict.fromkeys(KEYS, 0), 'variant': 'dense_4', 'settings': '01234567'}]).to_csv(tmp_path / LOSSES)
    assert read_tables(tmp_path, study)[LOSSES].settings.tolist() == ['01234567']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_an_error_keeps_the_rows_of_the_other_running_run(tiny, tmp_path, monkeypatch, error):
    study, failed = tiny[0](['dense_4'], [0]), threading.Event()
    first = next(study.runs())

    def fail_first(study, run):
        if run == first:
            failed.set()
            raise error
        failed.wait()
        time.sleep(0.2)
        return run_rows(study, run)

    monkeypatch.setattr(command, 'rows_of', fail_first)
    with pytest.raises(error):
        command.run_all(study, tmp_path, 2)
    losses = read_tables(tmp_path, study)[LOSSES]
    assert list(losses[KEYS].itertuples(index=False, name=None)) == [list(study.runs())[1].key]


def test_two_processes_do_not_write_one_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(command, 'Study', tiny[0])
    with in_use(tmp_path) as other:
        with pytest.raises(SystemExit, match=rf'in use by process {other} on .*, or set another folder \(--out\)$'):
            command.main(variants=['dense_4'], seeds=[0], out=tmp_path)
        assert not tiny[1]


def test_bad_input_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(command, 'Study', tiny[0])
    with pytest.raises(SystemExit, match=r'--variants: dense_5 is not in the study; known are dense_4'):
        command.main(variants=['dense_5'], out=tmp_path)
    with pytest.raises(SystemExit, match='nothing can be written'):
        (tmp_path / 'file').touch()
        command.main(out=tmp_path / 'file')
    pd.DataFrame([{'variant': 'dense_4', 'settings': 'other'}]).to_csv(tmp_path / LOSSES)
    with pytest.raises(SystemExit, match=r'losses.csv: runs of dense_4 have other settings; name another folder'):
        command.main(out=tmp_path)
    with pytest.raises(ValueError, match='no finished main run of dense_4'):
        write_report(tiny[0](), tmp_path / 'empty', tmp_path)


def test_the_kept_fraction_has_the_interval_of_a_simulation():
    """The delta method against the spread of the estimate over many drawn studies."""
    generator, n, s = np.random.default_rng(0), 5, 0.05
    mean = {'dense_4': 2.0, 'loop_x4': 1.5, 'itt': 1.8}
    found = []
    for _ in range(500):
        losses = pd.DataFrame({name: m + s * generator.standard_normal(n) for name, m in mean.items()})
        found.append(kept_fraction(losses, 'itt', Spread(s, 10**6)))
    values = np.array(found)
    assert values[:, 0].mean() == pytest.approx(0.4, abs=0.01)
    covered = ((values[:, 1] < 0.4) & (values[:, 2] > 0.4)).mean()
    assert 0.92 < covered < 0.98 and math.isfinite(values.sum())


def test_reach_is_the_last_position_with_ninety_percent():
    assert [reach('1.000 0.666 0.950 0.900 0.899'), reach('0.1 0.2')] == [3, -1]


def test_the_report_has_all_runs_and_one_seed_decides_nothing(tiny, tmp_path):
    variants = ['dense_4', 'loop_x4', 'itt_delta', 'dense_7']
    one, two = (tiny[0](variants, seeds) for seeds in ([0], [0, 1]))
    for study in (one, two):
        study.settings['tuning']['learning_rates'] = [0.01]
        command.run_all(study, tmp_path, 1)
        page = write_report(study, tmp_path, tmp_path / 'report').read_text()
        assert ('control: not decided' in page) == (study is one)
    assert 'Positive control' in page and page.count('`itt_delta`') >= 3 and 'Not finished' not in page
    assert {file.name for file in (tmp_path / 'report').iterdir()} == {
        'report.md', 'positions.png', 'reach.png', 'elastic.png'
    }  # fmt: skip
