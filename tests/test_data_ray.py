"""The Ray engine, on a cluster of processes on this machine: the local engine's shards, byte for byte."""

import contextlib
import json
import multiprocessing
import os
import signal
import time

import psutil
import pytest

from data_prep.conversion import convert

pytest.importorskip('ray', reason='the extra ray is not installed')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ray') / 'in'
    for domain, word in (('cc', 'ant'), ('wiki', 'bee')):
        (folder / domain).mkdir(parents=True)
        lines = [json.dumps({'text': f'{word} {n} ' * (n % 40)}) + '\n' for n in range(600)]
        (folder / domain / 'a.jsonl').write_text(''.join(lines))
    return folder


def run(source, out, engine, **options):
    return convert(
        source, out, seq_len=64, validation_tokens=2000, workers=2, unit_bytes=20_000, engine=engine, **options
    )


def content(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp('local') / 'out'
    run(source, out, 'local')
    return content(out)


def test_same_shards_and_bad_input_in_one_line(source, undisturbed, tmp_path):
    bad = source / 'wiki/b.jsonl'
    bad.write_text('bad\n')
    try:
        with pytest.raises(
            ValueError, match=r'^more than 0 bad lines; the last: wiki/b\.jsonl, line 1: not JSON'
        ) as error:
            run(source, tmp_path / 'bad', 'ray', max_bad_lines=0)
    finally:
        bad.unlink()
    assert '\n' not in str(error.value)
    run(source, tmp_path / 'out', 'ray')
    assert content(tmp_path / 'out') == undisturbed


def test_killed_driver_is_resumed(source, undisturbed, tmp_path):
    out = tmp_path / 'out'
    child = multiprocessing.get_context('spawn').Process(target=run, args=(source, out, 'ray'))
    child.start()
    deadline = time.monotonic() + 120
    while not list(out.glob('.conversion/units/*/*/record.json')) and time.monotonic() < deadline:
        time.sleep(0.02)
    cluster = psutil.Process(child.pid).children(recursive=True)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    try:
        assert not (out / 'manifest.json').exists()
        run(source, out, 'ray')
    finally:
        # Ray ends its own when their driver is gone, but some of them a good while later.
        for process in cluster:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert content(out) == undisturbed
