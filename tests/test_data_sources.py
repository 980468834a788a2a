"""Folders, lists of files, Parquet and Hugging Face data sets: the same documents whatever they come in."""

import json
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


def read(path, start=0, end=None):
    with open_documents(path, start, end) as documents:
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
    with pytest.raises(ValueError, match=r'other\.parquet: no column text; it has id, content'):
        read(path)
    path = write_parquet(tmp_path / 'numbers.parquet', texts=[1, 2, 3])
    with pytest.raises(ValueError, match=r'numbers\.parquet: column text is int64'):
        read(path)
    path = write_parquet(tmp_path / 'damaged.parquet', compression='none', use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data[:-50])
    with pytest.raises(ValueError, match=r'damaged\.parquet: cut off or damaged'):
        read(path)
    at = data.index(b'document 3 ')
    path.write_bytes(data[:at] + b'D' + data[at + 1 :])
    with pytest.raises(ValueError, match=r'damaged\.parquet: cut off or damaged'):
        read(path)


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
        ('{"a": []}', 'is empty'),
    ],
)
def test_list_of_files_that_cannot_be_used(tmp_path, content, reason):
    write_lines(tmp_path / 'x.jsonl')
    (tmp_path / 'files.json').write_text(content)
    with pytest.raises(ValueError, match=f'SOURCE: .*{reason}'):
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
    with pytest.raises(ValueError, match=f'SOURCE: cannot read {refused}: Permission denied'):
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
    with pytest.raises(ValueError, match=r'SOURCE: data set .*tales: no split train; there are test'):
        open_source(f'hf:{tmp_path}/tales')
    with pytest.raises(ValueError, match=r'SOURCE: data set .*nothing'):
        open_source(f'hf:{tmp_path}/nothing')
