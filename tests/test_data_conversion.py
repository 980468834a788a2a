"""A whole conversion: exact accounting, determinism, restarts after kills, and what bad input gets."""

import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import zstandard
from streaming import LocalDataset

from data_prep import conversion, cpus, finish, work_item
from data_prep.conversion import convert
from data_prep.engines import local, progress
from data_prep.input import embedded
from data_prep.tokens.tokenizer import load_saved, save_tokenizer
from itt_composer.training.run_lock import only_process

SEQ_LEN = 64
BOS, EOS = 1, 2
WORDS = [first + last for first in ('st', 'qu', 'm', 'l', 'b', 'e') for last in ('at', 'one', 'ing', 'or', 'y')]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer') / 'bpe'
    save_tokenizer(None, [' '.join(WORDS)] * 3, folder)
    return str(folder)


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = {'.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(''.join(line + '\n' for line in lines).encode()))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Five domains, each kind of file, documents from empty to many rows long, and texts that occur twice."""
    folder = tmp_path_factory.mktemp('source')
    generator = random.Random(0)

    def lines(count, longest):
        texts = [' '.join(generator.choices(WORDS, k=generator.randrange(longest))) for _ in range(count)]
        return [json.dumps({'meta': {}, 'text': text}) for text in texts]

    copies = lines(40, 60)
    write_lines(folder / 'common_crawl/2019-30/a.jsonl.zst', lines(60, 80))
    write_lines(folder / 'common_crawl/2019-30/b.jsonl.zst', [*lines(60, 80), *copies])
    write_lines(folder / 'c4/a.jsonl', [*copies, *lines(200, 80)])
    write_lines(folder / 'c4/b.jsonl.gz', lines(90, 80))
    write_lines(folder / 'arxiv/a.jsonl', lines(12, 1500))
    write_lines(folder / 'book/a.jsonl', lines(2, 4000))
    write_lines(folder / 'notes/a.jsonl', [*lines(80, 60), *copies[:20], 'broken', *copies[:20]])
    return folder


def run(source, out, tokenizer, **options):
    settings = dict(seq_len=SEQ_LEN, validation_tokens=1500, workers=2, work_item_bytes=9000)
    return convert(source, out, tokenizer, **settings | options)


@pytest.fixture(scope='module')
def undisturbed(source, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed') / 'out'
    return out, run(source, out, tokenizer, workers=1)


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob('*') if path.is_file()}


def rows_of(out: Path, split: str, domain: str) -> np.ndarray:
    folder = out / split / domain
    if not folder.is_dir():
        return np.empty((0, SEQ_LEN), np.uint16)
    return rows_at(folder)


def rows_at(folder: Path) -> np.ndarray:
    dataset = LocalDataset(str(folder))
    return np.stack([dataset[i]['tokens'] for i in range(len(dataset))])


def texts_of(source: Path) -> dict[str, list[str]]:
    """Every document of the tree, read in the plainest way."""
    names = {'common_crawl': 'cc', 'c4': 'c4-rp'}
    texts: dict[str, list[str]] = {}
    for path in sorted(source.rglob('*.jsonl*')):
        data = path.read_bytes()
        if path.suffix == '.gz':
            data = gzip.decompress(data)
        elif path.suffix == '.zst':
            data = zstandard.ZstdDecompressor().decompress(data)
        domain = path.relative_to(source).parts[0]
        found = [json.loads(line)['text'] for line in data.decode().splitlines() if line != 'broken']
        texts.setdefault(names.get(domain, domain), []).extend(found)
    return texts


def documents_in(rows: np.ndarray) -> list[tuple[int, ...]]:
    """The token ids of the documents that lie whole within rows laid end to end."""
    stream = rows.reshape(-1).tolist()
    documents, current = [], None
    for token in stream:
        if token == BOS:
            current = []
        elif token == EOS:
            if current is not None:
                documents.append(tuple(current))
            current = None
        elif current is not None:
            current.append(token)
    return documents


def test_every_token_is_accounted_for(source, undisturbed):
    out, manifest = undisturbed
    rust = load_saved(out / 'tokenizer')
    texts = texts_of(source)
    assert manifest['domains'].keys() == texts.keys()
    for domain, counts in manifest['domains'].items():
        splits = [counts['train'], counts['validation']]
        expected = [[BOS, *rust.encode(text).ids, EOS] for text in texts[domain] if text]
        assert counts['empty_documents'] == texts[domain].count('')
        assert sum(s['documents'] for s in splits) == len(expected)
        assert sum(s['bytes'] for s in splits) == sum(len(text.encode()) for text in texts[domain])
        assert sum(s['tokens'] for s in splits) == sum(map(len, expected))
        for name, count in zip(('train', 'validation'), splits, strict=True):
            rows = rows_of(out, name, domain)
            assert rows.shape == (count['rows'], SEQ_LEN)
            assert rows.dtype == np.uint16
            assert count['tokens'] == rows.size + count['dropped_tokens']
            assert count['dropped_tokens'] < SEQ_LEN


def test_rows_hold_the_documents_in_their_order(source, undisturbed):
    """arxiv is read as several work items; end to end, their rows are the file's documents up to where a row is cut."""
    out, _ = undisturbed
    rust = load_saved(out / 'tokenizer')
    expected = {tuple(rust.encode(text).ids): text for text in texts_of(source)['arxiv']}
    found = documents_in(rows_of(out, 'train', 'arxiv')) + documents_in(rows_of(out, 'validation', 'arxiv'))
    whole = [ids for ids in found if ids in expected]
    assert len(whole) > len(expected) / 2
    # The work items follow one another as the file does; only what filled no sequence of its own stands at the end.
    order = list(expected)
    shards = json.loads((out / 'train/arxiv/index.json').read_text())['shards']
    parts = [Path(shard['raw_data']['basename']).parent.name for shard in shards]
    items = [part for part in parts if part != 'rest']
    assert parts == sorted(parts) and parts[: len(items)] == items  # The rest comes last.
    rows = sum(shard['samples'] for shard in shards[: len(items)])
    positions = [order.index(ids) for ids in documents_in(rows_of(out, 'train', 'arxiv')[:rows]) if ids in expected]
    assert len(items) > 2 and len(positions) > 3 and positions == sorted(positions)
    # One work_item, no copies elsewhere: exactly the documents, in order, up to the last partial row.
    stream = [token for text in texts_of(source)['book'] if text for token in (BOS, *rust.encode(text).ids, EOS)]
    assert rows_of(out, 'train', 'book').reshape(-1).tolist() == stream[: len(stream) // SEQ_LEN * SEQ_LEN]


def test_no_validation_text_is_trained_on(source, undisturbed):
    out, manifest = undisturbed
    train, validation = set(), set()
    for domain, counts in manifest['domains'].items():
        train |= set(documents_in(rows_of(out, 'train', domain)))
        found = documents_in(rows_of(out, 'validation', domain))
        validation |= set(found)
        held_out = counts['validation']
        assert held_out['bytes'] <= 0.1 * (held_out['bytes'] + counts['train']['bytes'])
    # One word or none is too little to tell one document from another's end.
    assert len(validation) > 10
    assert not {ids for ids in validation & train if len(ids) > 8}


def test_copies_in_other_domains_are_on_one_side(tmp_path, tokenizer):
    """All of a small domain's candidates are also in a large domain with a lower threshold, which trains on them."""
    copies = [json.dumps({'text': f'{word} {n} {word}'}) for n, word in enumerate(WORDS * 4)]
    write_lines(tmp_path / 'in/cc/a.jsonl', copies)
    other = [json.dumps({'text': ' '.join(WORDS) + str(n)}) for n in range(3000)]
    write_lines(tmp_path / 'in/stackexchange/a.jsonl', other + copies)
    manifest = run(tmp_path / 'in', tmp_path / 'out', tokenizer, validation_tokens=40_000, work_item_bytes=100_000)
    small, large = manifest['domains']['cc'], manifest['domains']['stackexchange']
    assert large['validation_threshold'] < small['validation_threshold']
    hashes = [work_item.text_hash(json.loads(line)['text'].encode()) for line in copies]
    in_both = sum(h < large['validation_threshold'] for h in hashes)
    assert small['validation']['documents'] == in_both < sum(h < small['validation_threshold'] for h in hashes)
    assert small['train']['documents'] == len(copies) - in_both


@pytest.mark.parametrize('workers', [2, 3])
def test_the_number_of_workers_changes_nothing(source, tokenizer, undisturbed, tmp_path, workers):
    run(source, tmp_path / 'out', tokenizer, workers=workers)
    assert content(tmp_path / 'out') == content(undisturbed[0])


@pytest.mark.parametrize(('quota', 'usable'), [('max 100000', 3), ('150000 100000', 2), ('10000 100000', 1), (None, 3)])
def test_processes_are_as_many_as_the_cpus_that_may_be_used(monkeypatch, tmp_path, quota, usable):
    """Affinity (taskset, SLURM) and the quota of a container, not the machine's cores."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 1, 2})
    monkeypatch.setattr(cpus, '_QUOTA', tmp_path / 'cpu.max')
    if quota is not None:
        (tmp_path / 'cpu.max').write_text(quota + '\n')
    assert cpus.usable_cpus() == usable


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
    'driver before any work item is done': (local, 'wait', 0),
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


def test_one_process_at_a_time(source, tokenizer, undisturbed, tmp_path):
    """The second start says who is there; a process that died keeps nothing."""
    out = tmp_path / 'out'
    begun, context = multiprocessing.get_context('fork').Event(), multiprocessing.get_context('fork')

    def hold():
        with only_process(out):
            begun.set()
            signal.pause()

    child = context.Process(target=hold)
    child.start()
    assert begun.wait(30)
    with pytest.raises(ValueError, match=rf'out: in use by process {child.pid} on .*; wait for its end, or pass anoth'):
        run(source, out, tokenizer)
    child.kill()
    child.join()
    run(source, out, tokenizer)
    assert content(out) == content(undisturbed[0])
    assert not list(out.glob('.*'))


def test_a_finished_conversion_is_recognised(source, tokenizer, undisturbed, tmp_path, monkeypatch):
    out, manifest = undisturbed
    monkeypatch.setattr(conversion, '_convert', None)
    assert run(source, out, tokenizer, workers=3) == manifest
    moved = tmp_path / 'moved'
    shutil.copytree(source, moved)
    assert run(moved, out, tokenizer) == manifest


def test_other_versions_do_not_go_on_with_a_conversion(source, tokenizer, tmp_path):
    out = tmp_path / 'out'
    with pytest.raises(ValueError, match='bad lines'):
        run(source, out, tokenizer, max_bad_lines=0)
    job = out / '.conversion/job.json'
    known = json.loads(job.read_text())
    job.write_text(json.dumps(known | {'versions': known['versions'] | {'tokenizers': '0.0.1', 'python': '2.7'}}))
    with pytest.raises(ValueError, match=r'out was begun with tokenizers 0\.0\.1; install that'):
        run(source, out, tokenizer)
    job.write_text(json.dumps(known))
    assert run(source, out, tokenizer)['bad_lines']


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
    with pytest.raises(ValueError, match='holds something else'):
        run(source, source, tokenizer)
    (tmp_path / 'run').mkdir()
    for content_of, words in (('{"config": {}}', 'holds something else'), ('{', r'manifest\.json: not a JSON file')):
        (tmp_path / 'run/manifest.json').write_text(content_of)
        with pytest.raises(ValueError, match=words):
            run(source, tmp_path / 'run', tokenizer)


def test_bad_lines_are_counted_and_named(source, tokenizer, undisturbed):
    manifest = undisturbed[1]
    assert [(line['file'], line['line']) for line in manifest['bad_lines']] == [('notes/a.jsonl', 101)]
    assert {name: d['bad_lines'] for name, d in manifest['domains'].items() if d['bad_lines']} == {'notes': 1}


def test_too_many_bad_lines_stop_the_run_and_a_higher_limit_goes_on(source, tokenizer, undisturbed, tmp_path):
    out = tmp_path / 'out'
    with pytest.raises(ValueError, match=r'more than 0 bad lines.*notes/a\.jsonl, line 101: not JSON'):
        run(source, out, tokenizer, max_bad_lines=0)
    assert not (out / 'manifest.json').exists()
    run(source, out, tokenizer, max_bad_lines=1)
    assert content(out) == content(undisturbed[0])


def test_domains_without_enough_text(tmp_path, tokenizer):
    write_lines(tmp_path / 'in/wiki/a.jsonl', ['{"text": "%s"}' % ('the of ' * 100)] * 5)
    write_lines(tmp_path / 'in/short/a.jsonl', ['{"text": "the of"}'])
    with pytest.raises(ValueError, match='domain short has 6 bytes of text, less than a sequence of 64 tokens'):
        run(tmp_path / 'in', tmp_path / 'out', tokenizer)
    write_lines(tmp_path / 'in/short/a.jsonl', [json.dumps({'text': ' '.join(WORDS[:20])})])
    with pytest.raises(ValueError, match=r'domain short has \d+ training tokens, less than a sequence of 64'):
        run(tmp_path / 'in', tmp_path / 'third', tokenizer)
    write_lines(tmp_path / 'in/short/a.jsonl', ['nothing', '', '{}'])
    with pytest.raises(
        ValueError, match=r'short is empty: no line of .*a\.jsonl has a document; the first is bad: not JSON'
    ):
        run(tmp_path / 'in', tmp_path / 'other', tokenizer)


@pytest.mark.parametrize('option', ['seq_len', 'workers', 'validation_tokens', 'max_bad_lines'])
def test_settings_out_of_range(tmp_path, option):
    with pytest.raises(ValueError, match=rf'{option.upper()}: expected at least [012], got -1'):
        run(tmp_path, tmp_path / 'out', None, **{option: -1})
    assert not (tmp_path / 'out').exists()


def test_without_source_and_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, '_DOMAIN_BYTES', 100_000)
    manifest = run(None, tmp_path / 'out', None, validation_tokens=20_000)
    assert manifest['domains'].keys() == {'sources', 'docstrings', 'descriptions'}
    assert not manifest['bad_lines']
    assert manifest['tokenizer']['vocab_size'] == 4096
    assert run(None, tmp_path / 'out', None, validation_tokens=20_000) == manifest
    rust = load_saved(tmp_path / 'out/tokenizer')
    text = rust.decode(rows_of(tmp_path / 'out', 'train', 'sources').reshape(-1).tolist())
    assert 'import' in text
    embedded.write_corpus(tmp_path / 'again')
    assert content(tmp_path / 'again') == content(tmp_path / 'out/source')


def test_llama_accounting_against_sentencepiece(shared, tmp_path):
    from sentencepiece import SentencePieceProcessor

    oracle = SentencePieceProcessor(model_file=str(shared / 'data/llama_tokenizer/tokenizer.model'))
    for domain in ('cc', 'wiki'):
        (tmp_path / 'in' / domain).mkdir(parents=True)
        for file in (shared / 'data/redpajama_sample' / domain).iterdir():
            shutil.copy(file, tmp_path / 'in' / domain)
    manifest = run(tmp_path / 'in', tmp_path / 'out', str(shared / 'data/llama_tokenizer'), work_item_bytes=200_000)
    for domain, texts in texts_of(tmp_path / 'in').items():
        counts = manifest['domains'][domain]
        rows = [rows_of(tmp_path / 'out', name, domain) for name in ('train', 'validation')]
        dropped = sum(counts[name]['dropped_tokens'] for name in ('train', 'validation'))
        expected = [token for text in texts for token in (BOS, *oracle.encode(text), EOS)]
        assert sum(r.size for r in rows) + dropped == len(expected)
        # Counts of all tokens but the dropped ones: nothing is lost, nothing is there twice.
        ours = np.bincount(np.concatenate([r.reshape(-1) for r in rows]), minlength=32000)
        theirs = np.bincount(expected, minlength=32000)
        assert (ours <= theirs).all()
