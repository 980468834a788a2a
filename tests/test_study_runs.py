"""A small study trained through Composer in processes of its own: it fails in part, goes on, and repeats itself."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from multiprocessing import get_context

import pytest
from common.ranks import import_causal_models
from common.shards import write_data
from rich.console import Console
from streaming.base.util import merge_index

from itt_composer.training.finite_loss import FiniteLoss
from research.study import command
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


@pytest.fixture
def study(tmp_path, data, monkeypatch):
    """Runs the study in a folder, with overrides of its file."""
    import llmfoundry.command_utils  # noqa: F401  (before the forks, as the command does)

    import_causal_models()
    (tmp_path / 'small.yaml').write_text(STUDY)
    monkeypatch.setattr(command, 'console', Console(quiet=True))

    def run(out='out', *overrides, stored=()):
        loaded = load_study(tmp_path / 'small.yaml', [f'set.variables.data={data}', *overrides])
        folder = StudyFolder(loaded, tmp_path / out, stored)
        folder.path.mkdir(exist_ok=True)
        return command.carry_out(loaded, folder), folder

    return run


def losses(folder):
    table = read_table(folder.path / 'results.csv')
    return table.set_index(['run', 'domain', 'batch'])[['loss_threshold', 'loss_top_k', 'loss_train']]


def fail(folder):
    """Let a run fail: a file lies where its folder is to be."""
    folder.parent.mkdir(parents=True)
    folder.touch()


def test_one_seed_gives_one_loss_and_what_failed_is_tried_again(study, tmp_path, capfd):
    complete, first = study()
    assert complete and (first.path / 'report.md').is_file() and (first.path / 'curves.png').is_file()
    assert set(losses(first).index.get_level_values('batch')) == {3, 6}

    # Again with a variant that fails: the others have their losses, the same.
    fail(tmp_path / 'again/runs/bad-s3')
    complete, again = study('again', 'variants.bad={run: itt_x4}')
    assert not complete and set(again.done) == {'llama-s3', 'itt_x4-s3'}
    assert losses(again).equals(losses(first))
    assert 'bad-s3' in (again.path / 'logs' / 'bad-s3.log').read_text()

    # The manifest says how to repeat the runs, and on what they ran.
    manifest = json.loads((first.path / 'manifest.json').read_text())
    assert manifest['runs']['llama-s3']['run_file'] == 'llama_tiny.yaml'
    assert 'seed=3' in manifest['runs']['llama-s3']['overrides']
    (environment,) = manifest['environments']
    assert environment['environment']['packages']['torch'] and environment['environment']['threads'] == 1

    # Started again, nothing is trained; with another length it is refused before anything starts.
    before = (first.runs / 'llama-s3' / 'checkpoints' / 'latest-rank0.pt').stat().st_mtime_ns
    assert study()[0]
    assert (first.runs / 'llama-s3' / 'checkpoints' / 'latest-rank0.pt').stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r'llama-s3.*max_duration was 6ba and is now 9ba'):
        study('out', 'set.max_duration=9ba')
    with pytest.raises(ValueError, match=r'elastic\.llama: its models route no tokens'):
        study('out', 'elastic={itt_x4: 8, llama: 8}')

    # On another machine the stored tables stand for the runs, with the environment that they ran in.
    stored = tmp_path / 'stored'
    stored.mkdir()
    for name in ('results.csv', 'manifest.json'):
        (stored / name).write_text((first.path / name).read_text().replace('"threads": 1', '"threads": 7'))
    columns = 'run,variant,seed,hops,selection,kind,loss'
    (stored / 'answers.csv').write_text(f'{columns}\nllama-s3,llama,3,1,threshold,walk,1.5\n')
    # A variant of another name that is the same model is the same run.
    more = ['variants.loop={run: loop_x4}', 'variants.plain={run: llama}']
    complete, elsewhere = study('elsewhere', *more, stored=(StoredResults.read(stored),))
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
        study('longer', 'set.max_duration=9ba', stored=(StoredResults.read(stored),))


def test_a_killed_study_takes_its_runs_along_and_goes_on_to_the_same_loss(study):
    variants = ['variants.llama=null', 'set.max_duration=40ba', 'set.eval_interval=20ba', 'set.save_interval=5ba']
    _, whole = study('whole', *variants)
    process = get_context('fork').Process(target=study, args=('killed', *variants))
    process.start()
    folder = whole.path.parent / 'killed'
    log = folder / 'logs' / 'itt_x4-s3.log'
    _wait(lambda: log.is_file() and '[batch=7/40]' in log.read_text())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    length = _settled(log)
    assert '[batch=40/40]' not in log.read_text() and not (folder / 'results.csv').is_file()
    complete, resumed = study('killed', *variants)
    assert complete and losses(resumed).equals(losses(whole))
    # It went on from its checkpoint.
    assert '[batch=3/40]' not in log.read_text()[length:]


def test_a_sweep_gives_each_arm_its_best_setting(study, monkeypatch):
    """A run whose loss is not finite is one with an infinite loss."""

    def diverge(self, state, logger):
        if state.optimizers[0].param_groups[0]['initial_lr'] == 0.02 and state.timestamp.batch == 1:
            next(state.model.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(FiniteLoss, 'batch_start', diverge)
    tuning = 'tuning={seeds: [1], set: {max_duration: 3ba}, grid: {optimizer.lr: [0.0, 0.01, 0.02]}}'
    complete, folder = study('sweep', tuning, 'variants.itt_x4=null')
    assert complete and len(folder.done) == 4
    sweep = {name: final(rows).loss_threshold.item() for name, rows in folder.done.items() if name.startswith('tuning')}
    (diverged,) = (name for name, loss in sweep.items() if math.isnan(loss))
    assert folder.configs[diverged].optimizer.lr == 0.02 and len(set(sweep.values())) == 3
    best = folder.configs[min(sweep.keys() - {diverged}, key=sweep.get)].optimizer.lr
    assert folder.configs['llama-s3'].optimizer.lr == best
    manifest = json.loads((folder.runs / diverged / 'manifest.json').read_text())
    assert 'the loss of batch 2 is not finite' in manifest['not_finite']
    report = (folder.path / 'report.md').read_text()
    assert '| llama |' in report.split('## Sweep')[1] and '| diverged |' in report.split('## Sweep')[1]


def test_an_arm_whose_sweep_is_not_whole_waits(study, tmp_path):
    """Its best setting is not known yet; the other variants go on."""
    settings = 'settings: {base: {}, without: {optimizer: {lr: 1.0e-3}}}'
    fail(tmp_path / 'half/runs/tuning-bad-base-s1')
    complete, folder = study(
        'half',
        f'tuning={{seeds: [1], set: {{max_duration: 3ba}}, {settings}}}',
        'variants.bad={run: itt_x4}',
        'variants.llama=null',
    )
    sweep = {f'tuning-itt_x4-{setting}-s1' for setting in ('base', 'without')}
    assert not complete and set(folder.done) == {*sweep, 'tuning-bad-without-s1', 'itt_x4-s3'}
    assert 'bad-s3' not in folder.known and '## Sweep' in (folder.path / 'report.md').read_text()


def test_a_log_tells_this_attempt_from_the_one_before(tmp_path):
    log = tmp_path / 'run.log'
    assert batches_done(log, 0) is None
    log.write_text('[batch=450/900]:\n')
    start = log.stat().st_size
    assert batches_done(log, 0) == (450, 900) and batches_done(log, start) is None
    with open(log, 'a') as file:
        file.write('starting\n[batch=401/900]:\n')
    assert batches_done(log, start) == (401, 900)


def test_commands_for_a_cluster_are_printed_and_their_results_collected(study, capsys):
    complete, folder = study(
        'cluster', 'variants.llama=null', 'where={place: commands, launcher: composer -n 8 train.py}'
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert not complete and line.startswith('composer -n 8 train.py') and 'yamls/itt_x4_tiny.yaml' in line
    assert 'run_name=itt_x4-s3' in line and f'variables.runs={folder.runs}' in line
    # What the command would train, trained here.
    study('cluster', 'variants.llama=null')
    (folder.runs / 'itt_x4-s3' / 'results.csv').unlink()
    complete, folder = study('cluster', 'variants.llama=null', 'where={place: commands}')
    assert complete and len(folder.done) == 1 and not capsys.readouterr().out


def _wait(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _settled(log):
    """The log's length once nothing writes to it any more."""
    size, since = -1, time.monotonic()
    while time.monotonic() - since < 2:
        if log.stat().st_size != size:
            size, since = log.stat().st_size, time.monotonic()
        time.sleep(0.1)
    return size
