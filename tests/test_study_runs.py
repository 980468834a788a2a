"""A small study trained through Composer in processes of its own: it fails in part, goes on, and repeats itself."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from multiprocessing import get_context

import pytest
from common.disturbed_runs import each_batch
from common.pictures import save_coarsely
from common.ranks import import_causal_models
from common.shards import write_data
from rich.console import Console
from streaming.base.util import merge_index

from itt_composer.training.finite_loss import FiniteLoss
from itt_composer.training.run_error import RunError
from itt_composer.training.run_lock import only_process
from research.study import command, processes
from research.study.folder import StudyFolder
from research.study.processes import batches_done
from research.study.results import final, read_table
from research.study.stored import StoredResults
from research.study.study_file import load_study

STUDY = """
title: Small
size: tiny
where: {place: cpu, concurrent: 2}
seeds: [3]
set:
  model: {hidden_size: 32, num_hidden_layers: 2, intermediate_size: 48}
  max_seq_len: 32
  global_train_batch_size: 4
  max_duration: 6ba
  eval_interval: 3ba
  save_interval: 3ba
  console_log_interval: 1ba
  callbacks: {router_weights: null, step_encodings: null}
  variables: {merged_validation: true}
variants:
  llama: {}
  itt_x4: {}
report: {baselines: [llama]}
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp('data'), {'cc': 256, 'wiki': 64}, {'cc': 6, 'wiki': 4})
    merge_index(str(folder / 'validation'), keep_local=True)
    return folder


@pytest.fixture(scope='module')
def study(data, tmp_path_factory):
    """Runs the study in a folder, with overrides of its file."""
    import llmfoundry.command_utils  # noqa: F401  (before the forks, as the command does)

    import_causal_models()
    root = tmp_path_factory.mktemp('study')
    (root / 'small.yaml').write_text(STUDY)

    def run(out, *overrides, stored=()):
        loaded = load_study(root / 'small.yaml', [f'set.variables.data={data}', *overrides])
        folder = StudyFolder(loaded, root / out, stored)
        folder.path.mkdir(exist_ok=True)
        return command.carry_out(loaded, folder), folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, 'console', Console(quiet=True))
        patch.setattr(processes, '_POLL_SECONDS', 0.05)
        save_coarsely(patch)
        yield run


@pytest.fixture(scope='module')
def first(study):
    """The folder of the complete study."""
    complete, folder = study('first')
    assert complete
    return folder


def losses(folder):
    table = read_table(folder.path / 'results.csv')
    return table.set_index(['run', 'domain', 'batch'])[['loss_threshold', 'loss_top_k', 'loss_train']]


def fail(folder):
    """Let a run fail: a file lies where its folder is to be."""
    folder.parent.mkdir(parents=True)
    folder.touch()


def test_a_finished_study(study, first):
    assert (first.path / 'report.md').is_file() and (first.path / 'curves.png').is_file()
    assert set(losses(first).index.get_level_values('batch')) == {3, 6}

    # The manifest says how to repeat the runs, and on what they ran.
    manifest = json.loads((first.path / 'manifest.json').read_text())
    assert manifest['runs']['llama-s3']['run_file'] == 'llama_tiny.yaml'
    assert 'seed=3' in manifest['runs']['llama-s3']['overrides']
    (environment,) = manifest['environments']
    assert environment['environment']['packages']['torch'] and environment['environment']['threads'] == 1

    # Started again, nothing is trained; with another length it is refused before anything starts.
    before = (first.runs / 'llama-s3' / 'checkpoints' / 'latest-rank0.pt').stat().st_mtime_ns
    assert study('first')[0]
    assert (first.runs / 'llama-s3' / 'checkpoints' / 'latest-rank0.pt').stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r'llama-s3.*max_duration was 6ba and is now 9ba'):
        study('first', 'set.max_duration=9ba')
    with pytest.raises(ValueError, match=r'elastic\.llama: its models route no tokens'):
        study('first', 'elastic={itt_x4: 8, llama: 8}')


def test_stored_tables_stand_for_runs_with_the_environment_that_they_ran_in(study, first, tmp_path):
    for name in ('results.csv', 'manifest.json'):
        (tmp_path / name).write_text((first.path / name).read_text().replace('"threads": 1', '"threads": 7'))
    columns = 'run,variant,seed,hops,selection,kind,loss'
    (tmp_path / 'answers.csv').write_text(f'{columns}\nllama-s3,llama,3,1,threshold,walk,1.5\n')
    # A variant of another name that is the same model is the same run.
    more = ['variants.loop={run: loop_x4}', 'variants.plain={run: llama}']
    complete, elsewhere = study('elsewhere', *more, stored=(StoredResults.read(tmp_path),))
    assert complete and {path.name for path in elsewhere.runs.iterdir()} == {'loop-s3', 'tensorboard'}
    table = losses(elsewhere)
    assert table.loc[['llama-s3', 'itt_x4-s3']].equals(losses(first)) and len(table.loc['loop-s3']) == 4
    assert table.loc['plain-s3'].equals(losses(first).loc['llama-s3'])
    carried = [columns, 'llama-s3,llama,3,1,threshold,walk,1.5', 'plain-s3,plain,3,1,threshold,walk,1.5']
    assert (elsewhere.path / 'answers.csv').read_text().splitlines() == carried
    manifest = json.loads((elsewhere.path / 'manifest.json').read_text())
    assert set(manifest['runs']) == {'llama-s3', 'itt_x4-s3', 'loop-s3', 'plain-s3'}
    where = {entry['environment']['threads']: set(entry['runs']) for entry in manifest['environments']}
    assert where == {7: {'llama-s3', 'itt_x4-s3', 'plain-s3'}, 1: {'loop-s3'}}
    with pytest.raises(ValueError, match=r'llama-s3.*max_duration was 6ba and is now 9ba'):
        study('longer', 'set.max_duration=9ba', stored=(StoredResults.read(tmp_path),))


def test_a_killed_study_takes_its_runs_along_and_goes_on_to_the_same_loss(study, first, monkeypatch):
    settings = ['variants.llama=null', 'set.save_interval=2ba']

    def kill_the_study(state):
        if state.timestamp.batch == 5:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(300)

    with monkeypatch.context() as patch:
        each_batch(patch, kill_the_study)
        process = get_context('fork').Process(target=study, args=('killed', *settings))
        process.start()
        process.join()
    folder = first.path.parent / 'killed'
    _wait_until_nothing_runs_in(folder / 'runs' / 'itt_x4-s3')
    log = folder / 'logs' / 'itt_x4-s3.log'
    length = len(log.read_text())
    assert '[batch=5/6] loss' in log.read_text() and not (folder / 'results.csv').is_file()
    complete, resumed = study('killed', *settings)
    assert complete and losses(resumed).equals(losses(first).loc[['itt_x4-s3']])
    # It went on from its checkpoint.
    assert '[batch=4/6] loss' not in log.read_text()[length:]


def test_what_fails_or_diverges_in_a_sweep_lets_the_others_go_on(study, first, monkeypatch):
    """A run whose loss is not finite is one with an infinite loss; a variant whose sweep is not complete waits."""

    def diverge(self, state, logger):
        if state.optimizers[0].param_groups[0]['initial_lr'] == 0.02 and state.timestamp.batch == 1:
            next(state.model.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(FiniteLoss, 'batch_start', diverge)
    fail(first.path.parent / 'sweep/runs/tuning-bad-lr=0.02-s1')
    tuning = 'tuning={seeds: [1], set: {max_duration: 3ba}, grid: {optimizer.lr: [0.01, 0.02]}}'
    complete, folder = study('sweep', tuning, 'variants.itt_x4=null', 'variants.bad={run: loop_x4}')
    finite, diverged = (f'tuning-llama-lr={lr}-s1' for lr in (0.01, 0.02))
    bad, failed = (f'tuning-bad-lr={lr}-s1' for lr in (0.01, 0.02))
    assert not complete and set(folder.done) == {finite, diverged, bad, 'llama-s3'} and 'bad-s3' not in folder.known
    assert failed in (folder.path / 'logs' / f'{failed}.log').read_text()
    loss = {name: final(rows).loss_threshold.item() for name, rows in folder.done.items()}
    assert [name for name in loss if math.isnan(loss[name])] == [diverged]
    assert folder.configs['llama-s3'].optimizer.lr == 0.01
    manifest = json.loads((folder.runs / diverged / 'manifest.json').read_text())
    assert 'the loss of batch 2 is not finite' in manifest['not_finite']
    report = (folder.path / 'report.md').read_text()
    assert '| llama |' in report.split('## Sweep')[1] and '| diverged |' in report.split('## Sweep')[1]


def test_a_log_tells_this_attempt_from_the_one_before(tmp_path):
    log = tmp_path / 'run.log'
    assert batches_done(log, 0) is None
    log.write_text('[batch=450/900]:\n')
    start = log.stat().st_size
    assert batches_done(log, 0) == (450, 900) and batches_done(log, start) is None
    with open(log, 'a') as file:
        file.write('starting\n[batch=401/900]:\n')
    assert batches_done(log, start) == (401, 900)


def test_commands_for_a_cluster_are_printed_and_their_results_collected(study, first, capsys):
    commands = 'where={place: commands, launcher: composer -n 8 train.py}'
    complete, folder = study('cluster', 'variants.llama=null', commands)
    (line,) = capsys.readouterr().out.splitlines()
    assert not complete and line.startswith('composer -n 8 train.py') and 'yamls/itt_x4_tiny.yaml' in line
    assert 'run_name=itt_x4-s3' in line and f'variables.runs={folder.runs}' in line
    # As if the cluster had trained it.
    (first.runs / 'itt_x4-s3' / 'results.csv').unlink()
    complete, folder = study('first', commands)
    assert complete and 'itt_x4-s3' in folder.done and not capsys.readouterr().out


def _wait_until_nothing_runs_in(folder, seconds=120):
    end = time.monotonic() + seconds
    while True:
        try:
            with only_process(folder):
                return
        except RunError:
            assert time.monotonic() < end
            time.sleep(0.05)
