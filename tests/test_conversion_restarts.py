"""A conversion that is killed goes on to the same shards; another one in its folder is not touched."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
from common.conversions import content, run, write_source, write_tokenizer
from common.locked import in_use

from data_prep import conversion, finish, work_item
from data_prep.engines import local, progress


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'bpe')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp('source'))


@pytest.fixture(scope='module')
def undisturbed(source, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed') / 'out'
    return out, run(source, out, tokenizer, workers=1)


def kill_after(calls, function):
    """A stand-in for ``function`` that SIGKILLs its process at a call, as the machine might."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


KILLS = {
    'driver among the work items': (progress, 'check_bad_lines', 4),
    'worker within a work item': (work_item, 'text_hash', 200),
    'worker before a work item gets its place': (work_item, 'asdict', 3),
    'driver while domains are put together': (finish, '_merge', 2),
    'driver before the manifest': (conversion, 'write_manifest', 0),
}


@pytest.mark.parametrize('where', KILLS)
def test_killed_and_resumed(source, tokenizer, undisturbed, tmp_path, monkeypatch, where):
    module, name, calls = KILLS[where]
    out = tmp_path / 'out'
    with monkeypatch.context() as patch:
        patch.setattr(module, name, kill_after(calls, getattr(module, name)))
        child = multiprocessing.get_context('fork').Process(target=run, args=(source, out, tokenizer))
        child.start()
        child.join(60)
    assert child.exitcode == (-signal.SIGKILL if where.startswith('driver') else 1)
    assert not (out / 'manifest.json').exists()
    items = out / '.conversion/work_items'
    finished = {record.parent.relative_to(items).as_posix() for record in items.glob('*/*/record.json')}
    finished = {name for name in finished if not name.endswith('.partial')}

    def convert_work_item(recipe, work_item, tokenizer, report):
        assert work_item.name not in finished, 'a finished work item is done again'
        return original(recipe, work_item, tokenizer, report)

    original = local.convert_work_item
    monkeypatch.setattr(local, 'convert_work_item', convert_work_item)
    run(source, out, tokenizer)
    assert content(out) == content(undisturbed[0])


def test_a_finished_conversion_is_recognised(source, tokenizer, undisturbed, tmp_path, monkeypatch):
    out, manifest = undisturbed
    monkeypatch.setattr(conversion, '_convert', None)
    assert run(source, out, tokenizer, workers=3) == manifest
    moved = tmp_path / 'moved'
    shutil.copytree(source, moved)
    assert run(moved, out, tokenizer) == manifest


def test_another_conversion_is_not_touched(source, tokenizer, undisturbed, tmp_path):
    out, _ = undisturbed
    before = content(out)
    with pytest.raises(ValueError, match='seq_len 64 there, 65 asked for'):
        run(source, out, tokenizer, seq_len=65)
    with pytest.raises(ValueError, match=r'tokenizer .* there, byte-level BPE'):
        run(source, out, None)
    with pytest.raises(ValueError, match='holds a conversion of'):
        run(None, out, tokenizer)
    changed = tmp_path / 'changed'
    shutil.copytree(source, changed)
    with open(changed / 'arxiv/a.jsonl', 'a') as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match=r'arxiv/a\.jsonl has changed'):
        run(changed, out, tokenizer)
    assert content(out) == before
    with pytest.raises(ValueError, match='was not written by itt data'):
        run(source, source, tokenizer)
    (tmp_path / 'run').mkdir()
    for content_of, words in (('{"config": {}}', 'not written by itt data'), ('{', r'manifest\.json: not a JSON file')):
        (tmp_path / 'run/manifest.json').write_text(content_of)
        with pytest.raises(ValueError, match=words):
            run(source, tmp_path / 'run', tokenizer)


def test_bad_lines_are_counted_and_named(source, tokenizer, undisturbed):
    manifest = undisturbed[1]
    assert [(line['file'], line['line']) for line in manifest['bad_lines']] == [('notes/a.jsonl', 101)]
    assert {name: d['bad_lines'] for name, d in manifest['domains'].items() if d['bad_lines']} == {'notes': 1}


def test_a_start_that_is_refused_or_stopped_leaves_a_conversion_that_goes_on(source, tokenizer, undisturbed, tmp_path):
    out = tmp_path / 'out'
    in_use_by = r'out: in use by process {} on .*; wait for its end, or pass anoth'
    with in_use(out) as other, pytest.raises(ValueError, match=in_use_by.format(other)):
        run(source, out, tokenizer)

    with pytest.raises(ValueError, match=r'more than 0 bad lines.*notes/a\.jsonl, line 101: not JSON'):
        run(source, out, tokenizer, max_bad_lines=0)
    assert not (out / 'manifest.json').exists()

    job = out / '.conversion/job.json'
    known = json.loads(job.read_text())
    job.write_text(json.dumps(known | {'versions': known['versions'] | {'tokenizers': '0.0.1', 'python': '2.7'}}))
    with pytest.raises(ValueError, match=r'out was begun with tokenizers 0\.0\.1; install that'):
        run(source, out, tokenizer)
    job.write_text(json.dumps(known))

    # As after two kills, one of them within the removal of an abandoned folder.
    for name in ('rest.abandoned', 'rest.partial'):
        folder = out / '.conversion/work_items/notes' / name
        folder.mkdir(parents=True)
        (folder / 'file').touch()
    run(source, out, tokenizer, max_bad_lines=1)
    assert content(out) == content(undisturbed[0])
    assert not list(out.glob('.*'))
