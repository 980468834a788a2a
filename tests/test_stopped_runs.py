"""Runs that a signal, a loss or weights that are not finite stop, and the checkpoints that are kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from common.disturbed_runs import CONSTANT, checkpoints, each_batch, state, two_domains
from common.ranks import run_on_ranks
from common.tiny_runs import tiny_config
from composer.utils import dist

from itt_composer.analysis.tensorboard import RunLogs
from itt_composer.training.run import train as train_config
from itt_composer.training.run_error import RunError

TWO_SHARDS = (
    'fsdp_config={sharding_strategy: SHARD_GRAD_OP, state_dict_type: sharded, mixed_precision: FULL}',
    'device_train_microbatch_size=2',
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp('data'))


@pytest.fixture
def train(data, tmp_path):
    return lambda *overrides: train_config(tiny_config(data, tmp_path, 'run_name=r', *overrides))


def test_a_run_that_is_stopped_goes_on_as_if_it_was_not(train, tmp_path, monkeypatch):
    """Under a schedule, whose rate of the next batch must be that of the run that was not stopped."""
    train('max_duration=4ba')
    undisturbed = state(tmp_path / 'r')['model']
    shutil.rmtree(tmp_path / 'r')
    each_batch(monkeypatch, lambda state: state.timestamp.batch == 2 and os.kill(os.getpid(), signal.SIGINT))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(RunError, match='SIGINT after batch 3; the same command') as stopped:
        train('max_duration=4ba')
    assert stopped.value.exit_code == 130
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert checkpoints(tmp_path / 'r') == ['ep0-ba3-rank0.pt']
    train('max_duration=4ba')
    resumed = state(tmp_path / 'r')['model']
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


def test_two_ranks_stop_together_and_go_on(data, tmp_path, monkeypatch):
    """Sharded by FSDP 2, the run files' choice; the signal reaches one of them."""

    def on_a_rank():
        if dist.get_global_rank() == 1:
            each_batch(monkeypatch, lambda state: state.timestamp.batch == 2 and os.kill(os.getpid(), signal.SIGTERM))
        config = tiny_config(data, tmp_path, 'run_name=r', 'max_duration=4ba', *TWO_SHARDS)
        with pytest.raises(RunError, match='SIGTERM after batch 3; the same command') as stopped:
            train_config(config)
        dist.barrier()
        saved = [path.name for path in (tmp_path / 'r' / 'checkpoints').glob('ep*')]
        train_config(config)
        return stopped.value.exit_code, saved

    assert run_on_ranks(2, on_a_rank) == [(143, ['ep0-ba3'])] * 2
    assert len(RunLogs(tmp_path / 'tensorboard' / 'r').curve('loss/train/total')) == 4


RANK = """
import os, pathlib, signal, sys, time

def save(*_):
    time.sleep(1)
    pathlib.Path('saved' + os.environ['RANK']).touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
pathlib.Path('ready' + os.environ['RANK']).touch()
time.sleep(300)
"""


def test_the_launcher_passes_sigterm_on_and_waits(tmp_path):
    (tmp_path / 'rank.py').write_text(RANK)
    launcher = [sys.executable, '-m', 'itt_composer.training.launcher', '-n', '2', 'rank.py']
    process = subprocess.Popen(launcher, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(1200):
            if len(list(tmp_path.glob('ready*'))) == 2:
                break
            time.sleep(0.1)
        process.terminate()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert 'Waiting up to 1800 seconds' in output
    assert process.returncode == 143 and len(list(tmp_path.glob('saved*'))) == 2


def test_checkpoints_are_bounded_over_starts(train, tmp_path):
    train(CONSTANT, 'max_duration=4ba')
    assert checkpoints(tmp_path / 'r') == ['ep0-ba4-rank0.pt']
    train(CONSTANT, 'max_duration=8ba', 'save_num_checkpoints_to_keep=2')
    assert checkpoints(tmp_path / 'r') == ['ep0-ba6-rank0.pt', 'ep0-ba8-rank0.pt']


def test_a_loss_that_is_not_finite(train, tmp_path, monkeypatch):
    def poison(state):
        if state.timestamp.batch == 3:
            with torch.no_grad():
                next(state.model.parameters())[:] = float('nan')

    each_batch(monkeypatch, poison)
    for _ in range(2):
        with pytest.raises(RunError, match=r'loss of batch 4 is not finite, got nan; ep0-ba2-rank0\.pt is the last'):
            train(CONSTANT, 'max_duration=8ba', 'eval_interval=2ba')
        assert checkpoints(tmp_path / 'r') == ['ep0-ba2-rank0.pt']
    assert all(weight.isfinite().all() for weight in state(tmp_path / 'r')['model'].values())


def test_a_sharded_checkpoint_is_named_by_its_folder(data, tmp_path, monkeypatch):
    """One that this start has saved, and one of an earlier start."""

    def poison(state):
        if state.timestamp.batch == 2:
            with torch.no_grad():
                next(state.model.parameters()).to_local().fill_(float('nan'))

    def on_a_rank():
        each_batch(monkeypatch, poison)
        for _ in range(2):
            with pytest.raises(RunError, match='loss of batch 3 is not finite, got nan; ep0-ba2 is the last'):
                train_config(tiny_config(data, tmp_path, 'run_name=r', 'max_duration=4ba', *TWO_SHARDS))
            dist.barrier()

    run_on_ranks(2, on_a_rank)


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch):
    """The gradient of the batch before a checkpoint is NaN, its loss is not."""

    def poison(state):
        if state.timestamp.batch == 3:
            weight = next(state.model.parameters())
            weight.register_hook(lambda gradient: gradient * float('nan'))

    each_batch(monkeypatch, poison)
    for keys in ([], ['eval_interval=1ba']):
        with pytest.raises(RunError, match='weights after batch 4 are not finite'):
            train(CONSTANT, 'max_duration=8ba', *keys)
        assert checkpoints(tmp_path / 'r') == ['ep0-ba2-rank0.pt']


def test_weights_that_are_not_finite_are_not_saved_at_a_signal(train, tmp_path, monkeypatch):
    """The signal comes in the batch whose gradient is NaN; one checkpoint is kept, the good one."""

    def poison(state):
        if state.timestamp.batch == 2:
            next(state.model.parameters()).register_hook(lambda gradient: gradient * float('nan'))
            os.kill(os.getpid(), signal.SIGTERM)

    each_batch(monkeypatch, poison)
    with pytest.raises(RunError, match=r'after batch 3 are not finite; ep0-ba2-rank0\.pt is the last') as stopped:
        train(CONSTANT, 'max_duration=8ba')
    assert stopped.value.exit_code == 1
    assert checkpoints(tmp_path / 'r') == ['ep0-ba2-rank0.pt']


def test_wandb_offline(train, tmp_path, monkeypatch):
    """Composer would ask W&B's server for the run's latest checkpoint."""
    pytest.importorskip('wandb')
    for name, value in (('WANDB_MODE', 'offline'), ('WANDB_DIR', str(tmp_path)), ('WANDB_SILENT', 'true')):
        monkeypatch.setenv(name, value)
    train(CONSTANT, 'max_duration=2ba')
    train(CONSTANT, 'max_duration=4ba', 'loggers.wandb={project: x}')
    assert checkpoints(tmp_path / 'r') == ['ep0-ba4-rank0.pt']
