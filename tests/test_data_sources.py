"""Folders, lists of files, Parquet and Hugging Face data sets: the same documents whatever they come in."""

import gzip
import json
import lzma
import os

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from data_prep.input.formats import open_documents
from data_prep.input.reader import BadLine, Document
from data_prep.input.sources import open_source

TEXTS = [f'document {n} ' * (n % 7) for n in range(500)]


def write_parquet(path, texts=TEXTS, column='text', **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({'id': range(len(texts)), column: texts})
    parquet.write_table(table, path, row_group_size=100, write_page_checksum=True, **options)
    return path


def write_lines(path, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return path


def read(path, start=0, end=None, text_field='text'):
    with open_documents(path, text_field, start, end) as documents:
        return [item.text if isinstance(item, Document) else item for item in documents]


def test_parts_of_a_parquet_file_give_every_document_once(tmp_path):
    path = write_parquet(tmp_path / 'a.parquet')
    size = path.stat().st_size
    for part in (size // 9, size // 3, size, 2 * size):
        parts = [read(path, start, min(start + part, size)) for start in range(0, size, part)]
        assert [text for texts in parts for text in texts] == TEXTS
    assert sum(bool(texts) for texts in (read(path, at, at + size // 9) for at in range(0, size, size // 9))) == 5


def test_parquet_rows_without_a_text_are_named(tmp_path):
    texts = [*TEXTS[:150], None, *TEXTS[150:]]
    items = read(write_parquet(tmp_path / 'a.parquet', texts))
    assert [item for item in items if isinstance(item, BadLine)] == [BadLine(151, 'text is null')]
    assert [item for item in items if not isinstance(item, BadLine)] == TEXTS


def test_parquet_that_cannot_be_read(tmp_path):
    path = write_parquet(tmp_path / 'other.parquet', column='content')
    with pytest.raises(
        ValueError, match=r"other\.parquet: no text field 'text'; the fields are id, content; .*--text-field"
    ):
        read(path)
    path = write_parquet(tmp_path / 'numbers.parquet', texts=[1, 2, 3])
    with pytest.raises(ValueError, match=r'numbers\.parquet: column text is int64'):
        read(path)
    parquet.write_table(pyarrow.table([TEXTS, TEXTS], names=['text', 'text']), tmp_path / 'two.parquet')
    with pytest.raises(ValueError, match=r"two\.parquet: 2 columns are called 'text'"):
        read(tmp_path / 'two.parquet')
    path = write_parquet(tmp_path / 'damaged.parquet', compression='none', use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data[:-50])
    with pytest.raises(ValueError, match=r'damaged\.parquet: cut off or damaged'):
        read(path)
    at = data.index(b'document 3 ')
    path.write_bytes(data[:at] + b'D' + data[at + 1 :])
    with pytest.raises(ValueError, match=r'damaged\.parquet: cut off or damaged'):
        read(path)


@pytest.mark.parametrize(
    ('kind', 'suffix'),
    [
        *(('dictionary', 'parquet'), ('binary', 'PARQUET'), ('large_string', 'parquet')),
        *(('dictionary', 'arrow'), ('binary', 'arrow')),
    ],
)
def test_columns_of_text_in_other_types(tmp_path, kind, suffix):
    texts = pyarrow.array([*TEXTS, None, 'é漢'])
    column = texts.dictionary_encode() if kind == 'dictionary' else texts.cast(getattr(pyarrow, kind)())
    table = pyarrow.table({'content': column})
    path = tmp_path / f'a.{suffix}'
    if suffix == 'arrow':
        with pyarrow.OSFile(str(path), 'wb') as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    else:
        parquet.write_table(table, path)
    assert read(path, text_field='content') == [*TEXTS, BadLine(501, 'text is null'), 'é漢']


def test_bytes_that_are_no_text(tmp_path):
    parquet.write_table(pyarrow.table({'text': [b'fine', b'\xff']}), tmp_path / 'a.parquet')
    first, second = read(tmp_path / 'a.parquet')
    assert first == 'fine' and second.line == 2 and 'UTF-8' in second.reason


def left_out(folder):
    source = open_source(folder)
    return [file.path for file in source.files], {one.path: one.reason for one in source.left_out}


def test_every_file_is_read_or_left_out_with_the_reason(tmp_path):
    read_names = ['a.jsonl', 'B.JSONL', 'deep/e.parquet', 'c.json.gz', 'd.jsonl.xz']
    write_lines(tmp_path / 'wiki/a.jsonl')
    write_lines(tmp_path / 'wiki/B.JSONL')
    write_parquet(tmp_path / 'wiki/deep/e.parquet')
    data = (tmp_path / 'wiki/a.jsonl').read_bytes()
    (tmp_path / 'wiki/c.json.gz').write_bytes(gzip.compress(data))
    (tmp_path / 'wiki/d.jsonl.xz').write_bytes(lzma.compress(data))
    for name in read_names:
        assert read(tmp_path / 'wiki' / name) == TEXTS
    expected = {
        'README.md': 'beside the domain folders',
        'book.jsonl': 'beside the domain folders',
        '.cache': 'hidden',
        'old~': 'a backup copy',
        'wiki/.a.jsonl': 'hidden',
        'wiki/.ipynb_checkpoints': 'hidden',
        'wiki/a.jsonl~': 'a backup copy',
        'wiki/a.jsonl.bak': 'a backup copy',
        'wiki/a.txt': 'not one of',
        'wiki/a.json': 'not one of',
        'wiki/empty.jsonl.gz': 'empty',
        'wiki/pipe.jsonl': 'a named pipe',
        'wiki/null.jsonl': 'a device',
        'wiki/dead.jsonl': 'a link to nothing',
        'wiki/itself.jsonl': 'a link that leads to itself',
        'wiki/same.jsonl': 'the same as wiki/a.jsonl',
        'wiki/hard.jsonl': 'the same as wiki/a.jsonl',
    }
    for folder in ('.cache', 'old~', 'wiki/.ipynb_checkpoints'):
        write_lines(tmp_path / folder / 'a.jsonl')
    for name in ('README.md', 'book.jsonl', *(f'wiki/{name}' for name in ('.a.jsonl', 'a.jsonl~', 'a.jsonl.bak'))):
        write_lines(tmp_path / name)
    for name in ('a.txt', 'a.json'):
        write_lines(tmp_path / 'wiki' / name)
    (tmp_path / 'wiki/empty.jsonl.gz').touch()
    os.mkfifo(tmp_path / 'wiki/pipe.jsonl')
    (tmp_path / 'wiki/null.jsonl').symlink_to('/dev/null')
    (tmp_path / 'wiki/dead.jsonl').symlink_to('nothing')
    (tmp_path / 'wiki/itself.jsonl').symlink_to('itself.jsonl')
    (tmp_path / 'wiki/same.jsonl').symlink_to('a.jsonl')
    (tmp_path / 'wiki/hard.jsonl').hardlink_to(tmp_path / 'wiki/a.jsonl')
    found, reasons = left_out(tmp_path)
    assert sorted(found) == sorted(f'wiki/{name}' for name in read_names)
    assert reasons.keys() == expected.keys()
    assert all(reasons[name].startswith(reason) for name, reason in expected.items())


def test_links_lead_to_each_folder_once(tmp_path):
    """Circles, links to the source and to another domain, a domain that is a link, and two links to one folder."""
    write_lines(tmp_path / 'far/x.jsonl')
    write_lines(tmp_path / 'far/inner/y.jsonl')
    write_lines(tmp_path / 'in/book/b.jsonl')
    write_lines(tmp_path / 'in/wiki/a.jsonl')
    write_lines(tmp_path / 'more/m.jsonl')
    links = {
        'wiki/loop': '.',
        'wiki/up': '..',
        'wiki/book': '../book',
        'wiki/far': '../../far',
        'wiki/more': '../../more',
    }
    links |= {'linked': '../far', 'wiki/more2': '../../more', 'book/back': '../wiki'}
    for name, target in links.items():
        (tmp_path / 'in' / name).symlink_to(target)
    found, reasons = left_out(tmp_path / 'in')
    assert found == ['book/b.jsonl', 'linked/inner/y.jsonl', 'linked/x.jsonl', 'wiki/a.jsonl', 'wiki/more/m.jsonl']
    assert reasons == {
        'book/back': 'the same as wiki',
        'wiki/book': 'the same as book',
        'wiki/far': 'the same as linked',
        'wiki/loop': 'the same as wiki',
        'wiki/more2': 'the same as wiki/more',
        'wiki/up': 'leads back to the source',
    }


def test_files_without_their_end_mark_are_named_before_the_work(tmp_path):
    write_lines(tmp_path / 'wiki/a.jsonl')
    data = write_parquet(tmp_path / 'wiki/p.parquet').read_bytes()
    (tmp_path / 'wiki/p.parquet').write_bytes(data[:-4])
    (tmp_path / 'wiki/x.jsonl.xz').write_bytes(lzma.compress(b'{"text": "a"}\n')[:-1])
    with pytest.raises(ValueError, match=r'cut off, without their end mark: wiki/p\.parquet, wiki/x\.jsonl\.xz in'):
        open_source(tmp_path)


def test_a_domain_of_which_everything_is_left_out(tmp_path):
    write_lines(tmp_path / 'wiki/a.txt')
    with pytest.raises(ValueError, match=r'domain .*wiki is empty: .*left out: wiki/a\.txt \(not one of'):
        open_source(tmp_path)


def test_list_of_files(tmp_path):
    far = write_lines(tmp_path / 'far/a.jsonl')
    write_parquet(tmp_path / 'here/b.parquet')
    lists = {
        'files.json': json.dumps({'common_crawl': ['here/b.parquet', str(far)], 'x': ['here/b.parquet']}),
        'files.yaml': 'common_crawl:\n- here/b.parquet\n- far/a.jsonl\nx: [here/b.parquet]\n',
    }
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
        source = open_source(tmp_path / name)
        found = [(file.domain, file.path) for file in source.files]
        assert found == [('cc', 'far/a.jsonl'), ('cc', 'here/b.parquet'), ('x', 'here/b.parquet')]
        assert all(read(source.folder / file.path) == TEXTS for file in source.files)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ('{"a": [', 'cannot be read'),
        ('[1, 2]', 'no list of files'),
        ('{"a": "b.jsonl"}', 'no list of files'),
        ('{"a": ["b.txt"]}', r'b\.txt is not one of'),
        ('{"a": ["nothing.jsonl"]}', r'cannot read .*nothing\.jsonl'),
        ('{"a": ["x.jsonl", "x.jsonl"]}', 'twice'),
        ('{"a": ["x.jsonl", "./x.jsonl"]}', 'twice'),
        ('a: [x.jsonl]\na: [y.jsonl]', 'duplicate key'),
        ('{"wiki/en": ["x.jsonl"]}', "called 'wiki/en'"),
        ('{"..": ["x.jsonl"]}', "called '..'"),
        ('{"index.json": ["x.jsonl"]}', "called 'index.json'"),  # The place of the merged index.
        ('{"a\\nb": ["x.jsonl"]}', r"called 'a\\nb'"),
        ('{"a": []}', 'is empty'),
    ],
)
def test_list_of_files_that_cannot_be_used(tmp_path, content, reason):
    write_lines(tmp_path / 'x.jsonl')
    (tmp_path / 'files.json').write_text(content)
    with pytest.raises(ValueError, match=f'--source: .*{reason}'):
        open_source(tmp_path / 'files.json')


@pytest.mark.parametrize('folder', ['', 'wiki/deep'])
def test_folder_that_cannot_be_read(tmp_path, monkeypatch, folder):
    """Refused by a stand-in: the superuser may read whatever the modes say."""
    write_lines(tmp_path / 'wiki/deep/a.jsonl')
    refused = tmp_path / folder

    def refuse(function):
        def wrapped(path):
            if str(path) == str(refused):
                raise PermissionError(13, 'Permission denied', str(path))
            return function(path)

        return wrapped

    monkeypatch.setattr(os, 'scandir', refuse(os.scandir))
    monkeypatch.setattr(os, 'listdir', refuse(os.listdir))
    with pytest.raises(ValueError, match=f'--source: cannot read {refused}: Permission denied'):
        open_source(tmp_path)


@pytest.mark.parametrize('kind', ['saved', 'saved splits', 'folder of files'])
def test_hugging_face_data_set_in_a_folder(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    found = datasets.Dataset.from_dict({'text': TEXTS})
    folder = tmp_path / 'tales'
    if kind == 'saved':
        found.save_to_disk(str(folder), num_shards=2)
    elif kind == 'saved splits':
        datasets.DatasetDict(train=found, test=found.select(range(3))).save_to_disk(str(folder))
    else:
        write_parquet(folder / 'train.parquet')
    source = open_source(f'hf:{folder}')
    assert {file.domain for file in source.files} == {'tales'}
    assert [text for file in source.files for text in read(source.folder / file.path)] == TEXTS


def test_hugging_face_data_set_that_cannot_be_used(tmp_path):
    datasets.DatasetDict(test=datasets.Dataset.from_dict({'text': TEXTS})).save_to_disk(str(tmp_path / 'tales'))
    with pytest.raises(ValueError, match=r'--source: data set .*tales: no split train; there are test'):
        open_source(f'hf:{tmp_path}/tales')
    with pytest.raises(ValueError, match=r'--source: data set .*nothing'):
        open_source(f'hf:{tmp_path}/nothing')
