"""The Ray engine, on processes of this machine: the local engine's shards, byte for byte, even if a worker dies."""

import contextlib
import json
import os
import threading
import time

import psutil
import pytest
from common.conversions import content, run

from data_prep.engines import ray as ray_engine

# Ray gives its workers a nice value of 15: beside other work they would hardly run.
os.environ.setdefault('RAY_worker_niceness', '0')


@pytest.fixture(autouse=True, scope='module')
def ray():
    return pytest.importorskip('ray', reason='the extra ray is not installed')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Some forty work items in two domains; a line in the middle of them is bad."""
    folder = tmp_path_factory.mktemp('clusters') / 'in'
    for domain, word in (('cc', 'ant'), ('wiki', 'bee')):
        (folder / domain).mkdir(parents=True)
        lines = [json.dumps({'text': f'{word} {n} ' * (n % 40)}) + '\n' for n in range(1200)]
        (folder / domain / 'a.jsonl').write_text(''.join(lines) + ('bad\n' if domain == 'cc' else ''))
    return folder


@pytest.fixture(scope='module')
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp('local') / 'out'
    run(source, out, None)
    return content(out)


def test_a_running_cluster_has_its_own_workers(monkeypatch):
    monkeypatch.setenv('RAY_ADDRESS', 'nowhere:7077')
    with pytest.raises(ValueError, match='--workers: the cluster that RAY_ADDRESS names'):
        ray_engine.run(None, {}, 2)


def test_a_cluster_that_does_not_start_is_said_in_one_message(monkeypatch, ray):
    def init(**options):
        raise Exception('The current node timed out during startup.')

    monkeypatch.setattr(ray, 'init', init)
    with pytest.raises(RuntimeError, match=r'^--engine: Ray did not start, .* \(The current node .* --engine local$'):
        ray_engine.run(None, {}, 2)


def test_a_cluster_is_shut_down_after_an_error(monkeypatch, ray):
    calls = []
    monkeypatch.setattr(ray, 'init', lambda **options: calls.append('init'))
    monkeypatch.setattr(ray, 'shutdown', lambda: calls.append('shutdown'))
    with pytest.raises(AttributeError):
        ray_engine.run(None, {}, 2)  # Without a recipe, it fails after the start.
    assert calls == ['init', 'shutdown']


def kill_a_worker_within_a_unit(out, killed):
    """SIGKILL the process that a work item's unfinished folder is named after, until one dies before it is finished."""
    of_the_dead = set(out.glob('.conversion/work_items/*/*.partial'))
    while not killed.is_set():
        for folder in set(out.glob('.conversion/work_items/*/*.partial')) - of_the_dead:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                worker = psutil.Process(int(folder.name.split('-')[-1].split('.')[0]))
                worker.kill()
                worker.wait(5)
            if folder.exists():
                killed.set()
                return
        time.sleep(0.002)


def test_a_bad_line_and_a_killed_worker_change_nothing(source, undisturbed, tmp_path):
    """With one worker at a time, as every process of a cluster imports for some seconds."""
    out = tmp_path / 'out'
    killed = threading.Event()
    threading.Thread(target=kill_a_worker_within_a_unit, args=(out, killed), daemon=True).start()
    run(source, out, None, engine='ray', workers=1)
    assert killed.is_set(), 'no worker was killed within a work item'
    assert content(out) == undisturbed
