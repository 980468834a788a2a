"""Input, disks and stores that misbehave: one clear message each, and nothing is lost."""

import gzip
import json
import multiprocessing
import resource
import shutil

import numpy as np
import pytest
import zstandard
from streaming import LocalDataset
from typer.testing import CliRunner

from data_prep import __main__ as command
from data_prep.conversion import convert
from data_prep.tokens.tokenizer import load_saved, save_tokenizer
from data_prep.upload import check_remote, upload

SEQ_LEN = 64
GOOD = [f'good document {n} ' * (n % 5 + 1) for n in range(150)]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer') / 'bpe'
    save_tokenizer(None, GOOD, folder)
    return str(folder)


def as_lines(texts):
    return ''.join(json.dumps({'text': text}) + '\n' for text in texts).encode()


@pytest.fixture
def source(tmp_path):
    (tmp_path / 'in/wiki').mkdir(parents=True)
    (tmp_path / 'in/wiki/good.jsonl').write_bytes(as_lines(GOOD))
    return tmp_path / 'in'


def run(source, tokenizer, **options):
    settings = dict(seq_len=SEQ_LEN, validation_tokens=500, workers=2, work_item_bytes=3000)
    return convert(source, source.parent / 'out', tokenizer, **settings | options)


def decoded(out, domain='wiki'):
    rust = load_saved(out / 'tokenizer')
    sets = [LocalDataset(str(out / split / domain)) for split in ('train', 'validation')]
    return rust.decode(np.concatenate([s[i]['tokens'] for s in sets for i in range(len(s))]).tolist())


@pytest.mark.parametrize('suffix', ['gz', 'zst'])
def test_cut_off_file_stops_the_run_and_a_whole_one_goes_on(source, tokenizer, suffix):
    pack = gzip.compress if suffix == 'gz' else zstandard.ZstdCompressor().compress
    path = source / f'wiki/packed.jsonl.{suffix}'
    data = pack(as_lines(GOOD[::-1]))
    path.write_bytes(data[:-9])
    with pytest.raises(ValueError, match=rf'packed\.jsonl\.{suffix}: compressed data are cut off'):
        run(source, tokenizer)
    path.write_bytes(data)
    manifest = run(source, tokenizer)
    assert manifest['domains']['wiki']['train']['documents'] + manifest['domains']['wiki']['validation'][
        'documents'
    ] == 2 * len(GOOD)


def test_bad_bytes_and_odd_documents(source, tokenizer):
    odd = b'{"text": "\xff\xfe"}\n{"title": "no text"}\n' + as_lines(['nul \0 inside', '']) + b'\0\n\n{"text": "end"}'
    (source / 'wiki/odd.jsonl').write_bytes(odd)
    (source / 'wiki/empty.jsonl').touch()
    manifest = run(source, tokenizer, validation_tokens=0)
    assert manifest['domains']['wiki']['train']['documents'] == len(GOOD) + 2
    assert manifest['domains']['wiki']['empty_documents'] == 1
    assert manifest['source']['left_out'] == [{'path': 'wiki/empty.jsonl', 'reason': 'empty, 0 bytes'}]
    found = [(line['line'], line['reason'].split(':')[0]) for line in manifest['bad_lines']]
    assert found == [
        (1, 'invalid UTF-8'),
        (2, "no text field 'text'; the fields are title; name the one with the text"),
        (5, 'not JSON'),
    ]
    assert {line['file'] for line in manifest['bad_lines']} == {'wiki/odd.jsonl'}


def test_file_without_any_text(source, tokenizer):
    (source / 'wiki/other.jsonl').write_bytes(b'{"content": "x"}\n' * 200)
    with pytest.raises(ValueError, match=r'more than 100 bad lines.*other\.jsonl, line 101: no text field'):
        run(source, tokenizer)


def test_text_field_and_what_is_left_out_are_said(source, tokenizer):
    """The error for a missing field names the option; the command names all that it leaves out."""
    (source / 'cc').mkdir()
    lines = as_lines(GOOD).replace(b'"text"', b'"raw_content"')
    (source / 'cc/a.jsonl').write_bytes(lines)
    with pytest.raises(
        ValueError, match=r"cc is empty: .*no text field 'text'; the fields are raw_content; .*--text-f"
    ):
        run(source, tokenizer)
    shutil.rmtree(source / 'wiki')
    (source / 'cc/b.jsonl').write_bytes(b'{"raw_content": ""}\n' * 500)
    (source / 'cc/nothing.jsonl.gz').write_bytes(gzip.compress(b''))
    (source / 'cc/notes.txt').touch()
    arguments = ['--source', str(source), '--out', str(source.parent / 'out'), '--tokenizer', tokenizer]
    options = ['--seq-len', '64', '--validation-tokens', '0', '--workers', '1', '--text-field', 'raw_content']
    result = CliRunner().invoke(command.app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    output = ' '.join(result.output.split())
    for line in ('cc/notes.txt: not one of', 'cc/nothing.jsonl.gz: no lines in it', '500 empty documents of domain cc'):
        assert f'left out: {line}' in output
    manifest = json.loads((source.parent / 'out/manifest.json').read_text())
    assert manifest['domains']['cc']['train']['documents'] == len(GOOD)
    assert manifest['domains']['cc']['empty_documents'] == 500
    assert [one['path'] for one in manifest['source']['left_out']] == ['cc/notes.txt', 'cc/nothing.jsonl.gz']


def test_paths_with_blanks_quotes_and_a_home(source, tokenizer, monkeypatch):
    home = source.parent / "o'neil's $HOME #1"
    home.mkdir()
    source.rename(home / 'in')
    monkeypatch.setenv('HOME', str(home))
    manifest = convert('~/in', '~/out', tokenizer, seq_len=SEQ_LEN, validation_tokens=500, workers=1)
    assert (home / 'out/manifest.json').is_file()
    counts = manifest['domains']['wiki']
    assert counts['train']['documents'] + counts['validation']['documents'] == len(GOOD)
    assert 'good document 1 ' in decoded(home / 'out')


def test_one_very_long_line(source, tokenizer):
    """Many times longer than a work item, and than what the tokenizer is given at once."""
    (source / 'book').mkdir()
    (source / 'book/a.jsonl').write_bytes(as_lines(['first', 'good ' * 200_000, 'last']))
    manifest = run(source, tokenizer, validation_tokens=0, work_item_bytes=100_000)
    counts = manifest['domains']['book']['train']
    assert counts['documents'] == 3
    assert counts['bytes'] == 9 + 5 * 200_000


def limited(size, source, tokenizer, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        run(source, tokenizer, seq_len=16, work_item_bytes=1 << 20)
    except ValueError as error:
        queue.put(str(error))


def test_full_disk(source, tokenizer):
    """A limit on the size of a file stands for it, first while the tokenizer is written, then the shards."""
    (source / 'wiki/more.jsonl').write_bytes(as_lines(GOOD * 20))
    out = source.parent / 'out'
    context = multiprocessing.get_context('fork')
    for size, reached in ((2_000, 'tokenizer'), (20_000, 'shards')):
        if reached == 'shards':
            # What is small is there already: the tokenizer alone is larger than the limit.
            (source / 'wiki/bad.jsonl').write_bytes(b'bad\n')
            with pytest.raises(ValueError, match='more than 0 bad lines'):
                run(source, tokenizer, seq_len=16, work_item_bytes=1 << 20, max_bad_lines=0)
            shutil.rmtree(out / '.conversion/work_items')
        queue = context.SimpleQueue()
        child = context.Process(target=limited, args=(size, source, tokenizer, queue))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert 'no space left in' in queue.get()
        assert (out / 'tokenizer').is_dir() == (reached == 'shards')
        assert not (out / 'manifest.json').exists()
    manifest = run(source, tokenizer, seq_len=16, work_item_bytes=1 << 20)
    counts = manifest['domains']['wiki']
    assert counts['train']['documents'] + counts['validation']['documents'] == 21 * len(GOOD)


def test_tokenizer_that_changed_since_the_run_that_is_resumed(source, tokenizer, tmp_path):
    mine = shutil.copytree(tokenizer, tmp_path / 'mine')
    (source / 'wiki/bad.jsonl').write_bytes(b'bad\n')
    with pytest.raises(ValueError, match='more than 0 bad lines'):
        run(source, str(mine), max_bad_lines=0)
    save_tokenizer(None, [*GOOD, 'something else entirely ' * 9], mine)
    with pytest.raises(ValueError, match=r'holds another conversion \(tokenizer .*mine there, .*mine asked for'):
        run(source, str(mine))
    shutil.rmtree(mine)
    shutil.copytree(tokenizer, mine)
    saved = source.parent / 'out/tokenizer/tokenizer.json'
    before = saved.read_text()
    saved.write_text(before + ' ')
    with pytest.raises(ValueError, match='out/tokenizer was changed since'):
        run(source, str(mine))
    saved.write_text(before)
    assert run(source, str(mine))['bad_lines']


def test_copy_to_a_store_goes_on_and_is_whole(source, tokenizer, tmp_path, monkeypatch):
    from streaming.base.storage import upload as uploaders

    manifest = run(source, tokenizer)
    out, remote = source.parent / 'out', tmp_path / 'store'
    original, names = uploaders.LocalUploader.upload_file, []

    def fail_after_some(self, filename):
        if len(names) == 4:
            raise OSError('the store is away')
        names.append(filename)
        original(self, filename)

    with monkeypatch.context() as patch:
        patch.setattr(uploaders.LocalUploader, 'upload_file', fail_after_some)
        with pytest.raises(RuntimeError, match=r'--remote: .*store: the store is away; the same command continues'):
            upload(out, str(remote), manifest)
    assert not (remote / 'manifest.json').exists()
    upload(out, str(remote), manifest)
    expected = {p.relative_to(out): p.read_bytes() for p in out.rglob('*') if p.is_file() and '.uploaded' not in p.name}
    assert {p.relative_to(remote): p.read_bytes() for p in remote.rglob('*') if p.is_file()} == expected
    # Asked for again, it is not taken for granted: the store may have lost it.
    shutil.rmtree(remote)
    upload(out, str(remote), manifest)
    assert {p.relative_to(remote): p.read_bytes() for p in remote.rglob('*') if p.is_file()} == expected
    with pytest.raises(ValueError, match=r'--remote: ftp://x: Invalid Cloud provider'):
        check_remote('ftp://x')

    def refuse(*arguments, **keywords):
        raise Exception('no credentials\nfor you')

    monkeypatch.setattr(uploaders.CloudUploader, 'get', refuse)
    with pytest.raises(ValueError, match='--remote: s3://x: no credentials for you'):
        check_remote('s3://x')


def test_budgets(capsys):
    domains = {name: {'proportion': share} for name, share in {'cc': 0.75, 'wiki': 0.2, 'none': 0.05}.items()}
    command._show_budgets('budget', domains, {'cc': 1000.0, 'wiki': 80.0, 'none': 0.0}, 800)
    rows = [line.replace('│', ' ').split() for line in capsys.readouterr().out.splitlines()]
    assert ['cc', '0.750', '600', '1.0', 'k', '0', '0.60'] in rows
    assert ['wiki', '0.200', '160', '80', '80', '2.00'] in rows
    assert ['none', '0.050', '40', '0', '40', 'inf'] in rows


def test_the_command_shows_the_budget_before_the_work(source, tokenizer):
    arguments = ['--source', str(source), '--out', str(source.parent / 'out'), '--tokenizer', tokenizer]
    options = ['--seq-len', '64', '--validation-tokens', '500', '--budget-tokens', '1000000', '--workers', '1']
    result = CliRunner().invoke(command.app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    before, after = result.output.split('shards', 1)
    for part in (before, after):
        assert 'a run of 1,000,000 tokens' in part
        assert 'missing' in part
    result = CliRunner().invoke(command.app, [*arguments, '--engine', 'slurm'])
    assert result.exit_code == 1
    assert "error: --engine: 'slurm' is not one of local, ray" in result.output
