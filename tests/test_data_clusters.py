"""The cluster engines, on processes of this machine: the local engine's shards, byte for byte, whatever is killed."""

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import psutil
import pytest

from data_prep.conversion import convert


@pytest.fixture(scope='module', params=['ray', 'spark'])
def engine(request):
    module = {'ray': 'ray', 'spark': 'pyspark'}[request.param]
    pytest.importorskip(module, reason=f'the extra {request.param} is not installed')
    return request.param


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Some forty units in two domains; a line in the middle of them is bad."""
    folder = tmp_path_factory.mktemp('clusters') / 'in'
    for domain, word in (('cc', 'ant'), ('wiki', 'bee')):
        (folder / domain).mkdir(parents=True)
        lines = [json.dumps({'text': f'{word} {n} ' * (n % 40)}) + '\n' for n in range(1200)]
        (folder / domain / 'a.jsonl').write_text(''.join(lines) + ('bad\n' if domain == 'cc' else ''))
    return folder


def run(source, out, engine, **options):
    settings = dict(seq_len=64, validation_tokens=2000, workers=2, unit_bytes=10_000)
    return convert(source, out, engine=engine, **settings | options)


def content(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp('local') / 'out'
    run(source, out, 'local')
    return content(out)


@pytest.mark.parametrize(('engine', 'variable'), [('ray', 'RAY_ADDRESS'), ('spark', 'MASTER')])
def test_a_cluster_that_is_there_has_its_own_workers(engine, variable, monkeypatch):
    pytest.importorskip({'ray': 'ray', 'spark': 'pyspark'}[engine])
    monkeypatch.setenv(variable, 'nowhere:7077')
    with pytest.raises(ValueError, match=f'WORKERS: the cluster that {variable} names'):
        importlib.import_module(f'data_prep.engines.{engine}').run(None, {}, 2)


def test_a_cluster_that_does_not_start_is_said_in_one_message(monkeypatch):
    ray = pytest.importorskip('ray')

    def init(**options):
        raise Exception('The current node timed out during startup.')

    monkeypatch.setattr(ray, 'init', init)
    with pytest.raises(RuntimeError, match=r'^ENGINE: Ray did not start, .* \(The current node .* ENGINE=local$'):
        importlib.import_module('data_prep.engines.ray').run(None, {}, 2)


def kill_a_worker_within_a_unit(out, killed):
    """SIGKILL the process that a unit's unfinished folder is named after, until one dies before it is finished."""
    of_the_dead = set(out.glob('.conversion/units/*/*.partial'))
    while not killed.is_set():
        for folder in set(out.glob('.conversion/units/*/*.partial')) - of_the_dead:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                worker = psutil.Process(int(folder.name.split('-')[-1].removesuffix('.partial')))
                worker.kill()
                worker.wait(5)
            if folder.exists():
                killed.set()
                return
        time.sleep(0.0005)


def test_kills_and_bad_input_change_nothing(engine, source, undisturbed, tmp_path):
    """In one conversion, as every process of a cluster imports for some seconds; with two, one and three workers."""
    out = tmp_path / 'out'
    driver = multiprocessing.get_context('fork').Process(target=run, args=(source, out, engine))
    driver.start()
    deadline = time.monotonic() + 240
    while not list(out.glob('.conversion/units/*/*/record.json')):
        assert driver.is_alive() and time.monotonic() < deadline, 'no unit was finished; the driver says why'
        time.sleep(0.01)
    cluster = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()
    # The engines end their own when their driver is gone, but some of them a good while later.
    for process in cluster:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not (out / 'manifest.json').exists()

    shutil.rmtree(out / '.conversion/units/cc', ignore_errors=True)  # if the bad line was read, it is read again
    with pytest.raises(
        ValueError, match=r'^more than 0 bad lines; the last: cc/a\.jsonl, line 1201: not JSON'
    ) as error:
        run(source, out, engine, workers=1, max_bad_lines=0)
    assert '\n' not in str(error.value)

    # However far the runs before came, there is work left.
    shutil.rmtree(out / '.conversion/units/wiki', ignore_errors=True)
    killed = threading.Event()
    threading.Thread(target=kill_a_worker_within_a_unit, args=(out, killed), daemon=True).start()
    run(source, out, engine, workers=3)
    assert killed.is_set(), 'no worker was killed within a unit'
    assert content(out) == undisturbed
