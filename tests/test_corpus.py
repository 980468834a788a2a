"""The corpus command on tiny packages made here: no network, apt's own source is a folder."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile

import pytest
import zstandard
from typer.testing import CliRunner

from data_prep.input.sources import open_source
from research.__main__ import app
from research.corpus import command
from research.corpus.deduplicate import Deduplicator
from research.corpus.text import plain_text

needs_apt = pytest.mark.skipif(
    not (shutil.which('apt-get') and shutil.which('dpkg-deb')), reason='needs apt-get and dpkg-deb'
)
LICENCE = 'Format: x\n\nFiles: *\nLicense: MIT\n\nFiles: x\nLicense: GPL-2+\n'


def sentence(i: int) -> str:
    """A sentence of its own letters."""
    digits = hashlib.sha256(str(i).encode()).hexdigest()
    return ' '.join('abcdefghijklmnop'[int(d, 16)] * 3 for d in digits[:40])


def document(*paragraphs: int) -> str:
    return '\n\n'.join(f'{sentence(i)}.' for i in paragraphs)


@pytest.fixture
def repository(tmp_path):
    """A function that makes packages from {package: {path: content}} and returns the text of a recipe's source."""
    folder = tmp_path / 'repository'
    folder.mkdir()

    def make(packages):
        index = ''
        for name, files in packages.items():
            tree = tmp_path / 'trees' / name
            control = f'Package: {name}\nVersion: 1.2-3\nArchitecture: all\nMaintainer: m <m@m>\nDescription: d\n'
            for path, content in {'DEBIAN/control': control, **files}.items():
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                (tree / path).write_bytes(content if isinstance(content, bytes) else content.encode())
            deb = folder / f'{name}_1.2-3_all.deb'
            subprocess.run(
                ['dpkg-deb', '--root-owner-group', '--build', str(tree), str(deb)], check=True, capture_output=True
            )
            content = deb.read_bytes()
            index += f'{control}Filename: ./{deb.name}\nSize: {len(content)}\n'
            index += f'SHA256: {hashlib.sha256(content).hexdigest()}\n\n'
        (folder / 'Packages').write_text(index)
        return f'deb [trusted=yes] file:{folder} ./'

    return make


def run(tmp_path, source, domains):
    recipe = tmp_path / 'packages.yaml'
    recipe.write_text(json.dumps({'source': source, 'domains': domains}))
    out = tmp_path / 'out' / 'corpus'
    return CliRunner().invoke(app, ['corpus', str(out), '--packages', str(recipe)]), out


def documents(out, domain):
    read = zstandard.ZstdDecompressor()
    lines = [
        line
        for path in sorted((out / 'source' / domain).iterdir())
        for line in read.stream_reader(path.open('rb')).read().decode().splitlines()
    ]
    return [json.loads(line) for line in lines]


@needs_apt
def test_a_corpus_of_two_packages(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(command, 'FILE_BYTES', 900)
    archive = tmp_path / 'tree.tar.xz'
    (tmp_path / 'a.c').write_text(document(20, 21))
    with tarfile.open(archive, 'w:xz') as tar:
        tar.add(tmp_path / 'a.c', 'tree/kernel/a.c')
        tar.add(tmp_path / 'a.c', 'tree/drivers/b.c')
    source = repository({
        'manual': {
            'usr/share/doc/manual/copyright': LICENCE,
            'usr/share/doc/manual/a.txt': document(1, 2, 3),
            'usr/share/doc/manual/b.txt.gz': gzip.compress(document(1, 4, 5).encode()),
            'usr/share/doc/manual/c.txt': document(3, 2, 1),
            'usr/share/doc/manual/d.txt': b'\xff' * 300,
            'usr/share/doc/manual/e.txt': 'short',
            'usr/share/doc/manual/f.html': document(9, 10),
        },
        'source': {'usr/share/doc/source/copyright': 'License: see below', 'usr/src/t.tar.xz': archive.read_bytes()},
    })  # fmt: skip
    result, out = run(tmp_path, source, {'text': {'manual': ['*.txt', '*.txt.gz']}, 'c': {'source': ['*/kernel/*.c']}})
    assert result.exit_code == 0, result.output
    # a whole, b without the paragraph of a; c has nothing new, d is no text, e is short, f no document.
    assert {d['path'][21:]: d['text'] for d in documents(out, 'text')} == {
        'a.txt': document(1, 2, 3),
        'b.txt.gz': document(4, 5),
    }
    assert [(d['path'], d['package'], d['text']) for d in documents(out, 'c')] == [
        ('tree/kernel/a.c', 'source', document(20, 21))
    ]
    manifest = json.loads((out / 'manifest.json').read_text())
    manual, code = manifest['packages']['manual'], manifest['packages']['source']
    assert (manual['version'], manual['domain'], manual['licences']) == ('1.2-3', 'text', ['GPL-2+', 'MIT'])
    assert (manual['files'], manual['documents'], manual['not_utf8']) == (5, 2, 1)
    assert manual['bytes'] == len(document(1, 2, 3)) + len(document(4, 5)) == manifest['domains']['text']['bytes']
    assert (out / manual['copyright']).read_text() == LICENCE
    assert code['licences'] == [] and (out / code['copyright']).read_text() == 'License: see below'
    # One document a file, since two exceed the limit; itt data finds them all.
    assert [file.path for file in open_source(out / 'source').files] == [
        'c/000.jsonl.zst', 'text/000.jsonl.zst', 'text/001.jsonl.zst',
    ]  # fmt: skip
    again, _ = run(tmp_path, source, {'text': {'manual': ['*.txt']}})
    assert again.exit_code and 'name another folder' in str(again.exception)


@needs_apt
@pytest.mark.parametrize(
    ('domains', 'words'),
    [
        ({'text': {'manual': ['*.txt'], 'missing': ['*']}}, 'Unable to locate package missing'),
        ({'text': {'manual': ['*.txt', '*.rst']}}, 'manual: no file of manual_1.2-3_all.deb matches *.rst'),
        ({'text': {'bare': ['*.txt']}}, 'bare: no copyright file in bare_1.2-3_all.deb'),
    ],
)
def test_packages_without_what_is_asked_for_are_one_line(repository, tmp_path, domains, words):
    source = repository({
        'manual': {'usr/share/doc/manual/copyright': LICENCE, 'usr/share/doc/manual/a.txt': document(1, 2)},
        'bare': {'usr/share/doc/bare/a.txt': document(3, 4)},
    })  # fmt: skip
    check_refused(*run(tmp_path, source, domains), words)


@pytest.mark.parametrize(
    ('domains', 'words'),
    [
        ({'text': {'manual': '*.txt'}}, "domains.text.manual: expected a list of patterns, got '*.txt'"),
        ({'text': {'manual': ['*']}, 'more': {'manual': ['*']}}, 'a package is listed twice'),
        ({'a/b': {'manual': ['*']}}, 'expected a name without path parts'),
        ({}, 'source or domains is missing or empty'),
    ],
)
def test_mistakes_in_the_list_of_packages_are_one_line(tmp_path, domains, words):
    check_refused(*run(tmp_path, 'deb file:/none ./', domains), words)


def check_refused(result, out, words):
    message = str(result.exception)
    assert result.exit_code and message.startswith('corpus: ') and words in message and '\n' not in message
    assert not out.exists() and not list(out.parent.glob('.*'))


@needs_apt
def test_a_damaged_package_is_named(repository, tmp_path):
    from research.corpus.packages import files

    repository({'manual': {'usr/share/doc/manual/a.txt': document(*range(200))}})
    deb = next((tmp_path / 'repository').glob('*.deb'))
    deb.write_bytes(deb.read_bytes()[:-600])
    with pytest.raises(ValueError, match=r'manual_1\.2-3_all\.deb: damaged'):
        for _, content in files(deb):
            content.read()


def test_duplicates_differ_in_space_case_and_numbers_at_most():
    deduplicator = Deduplicator()
    assert deduplicator.new_text(document(1, 2)) == document(1, 2)
    near = document(1, 2).upper().replace(' ', '\n  ').replace('.', ', 17')
    assert deduplicator.new_text(near) is None
    assert deduplicator.new_text(document(1, 3, 4)) == document(3, 4)
    # More than half of it is known: all of it goes, and its new paragraph may come again.
    assert deduplicator.new_text(document(1, 2, 3, 5)) is None
    assert deduplicator.new_text(document(5, 6)) == document(5, 6)
    # Short paragraphs may repeat, complete documents of them not.
    short = '\n\n'.join(['if x:', 'return'] * 20)
    assert deduplicator.new_text(short) == short and deduplicator.new_text(short) is None
    # A paragraph repeated within one document stays.
    assert deduplicator.new_text(document(7, 8, 7)) == document(7, 8, 7)


def test_the_text_of_an_rfc_has_no_pages():
    pages = (
        'Contents\n\n   1. Start . . . . . . . 2\n\n   It ends\n\n\nDoe      Standards Track     [Page 1]\n\f\n'
        'RFC 1         Title         May 2001\n\n\n   here.\n\n\nDoe      Standards Track     [Page 2]\n\f\n'
        'RFC 1         Title         May 2001\n\n   Next.\n\n\nDoe      Standards Track     [Page 3]\n'
    )
    assert plain_text('rfc1.txt', pages.encode()) == 'Contents\n\n   It ends\n   here.\n\n   Next.'


def test_the_text_of_html():
    html = (
        '<html><head><title>T</title><style>p {}</style></head><body><h1>A &amp; B</h1>'
        '<p>one\n  <b>two</b></p><ul><li>x</li><li>y</li></ul><pre>a\n  b</pre><script>f()</script></body></html>'
    )
    assert plain_text('a.HTML', html.encode()) == 'A & B\n\none two\n\nx\ny\n\na\n  b'
    assert plain_text('a.txt', html.encode()) == html
