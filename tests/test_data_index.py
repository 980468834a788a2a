"""The indexes of a converted folder list each sequence once, and its fingerprint is that of earlier versions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from streaming import LocalDataset, MDSWriter
from streaming.base.util import merge_index

from data_prep.conversion import convert
from data_prep.manifest import file_hashes
from itt_composer.config.run_file import resolve
from itt_composer.data_folder import fingerprint

SEQ_LEN = 32
DOMAINS = {'book': 'bee', 'wiki': 'ant'}


def write_source(folder: Path, domain: str, word: str, lines: int) -> Path:
    (folder / domain).mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps({'text': f'{word} {n} ' * (n % 9)}) + '\n' for n in range(lines))
    (folder / domain / 'a.jsonl').write_text(text)
    return folder


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('index')
    for domain, word in DOMAINS.items():
        write_source(folder / 'in', domain, word, 200)
    manifest = convert(
        folder / 'in', folder / 'out', seq_len=SEQ_LEN, validation_tokens=500, workers=1, work_item_bytes=4000
    )
    return folder / 'out', manifest


@pytest.fixture(scope='module')
def as_before(converted, tmp_path_factory):
    """The folder as version 0.1 wrote it: each part with an index of its own, here by streaming's writer."""
    out = shutil.copytree(converted[0], tmp_path_factory.mktemp('before') / 'out')
    columns = {'tokens': f'ndarray:uint16:{SEQ_LEN}'}
    for domain in DOMAINS:
        rows = rows_at(out / 'train' / domain)
        shards = json.loads((out / 'train' / domain / 'index.json').read_text())['shards']
        for shard in shards:
            part, first = out / 'train' / domain / Path(shard['raw_data']['basename']).parent, shard['samples']
            shutil.rmtree(part)
            with MDSWriter(out=str(part), columns=columns, hashes=['xxh64'], size_limit=shard['size_limit']) as writer:
                for row_S in rows[:first]:
                    writer.write({'tokens': row_S})
            rows = rows[first:]
        assert len(shards) > 2 and len(rows) == 0
    return out


def rows_at(folder: Path) -> np.ndarray:
    dataset = LocalDataset(str(folder))
    return np.stack([dataset[i]['tokens'] for i in range(len(dataset))])


def test_an_index_over_all_domains_has_each_sequence_once(converted, tmp_path):
    """What streaming's own merge_index makes of the folder, as someone does who wants one dataset of all domains."""
    out, manifest = converted
    for split in ('train', 'validation'):
        folder = shutil.copytree(out / split, tmp_path / split)
        (folder / 'index.json').unlink(missing_ok=True)  # streaming does not write over one.
        merge_index(str(folder), keep_local=True)
        domains = [rows_at(out / split / domain) for domain in DOMAINS]
        rows = sum(manifest['domains'][domain][split]['rows'] for domain in DOMAINS)
        assert len(rows_at(folder)) == rows > 4
        assert sorted(map(bytes, rows_at(folder))) == sorted(map(bytes, np.concatenate(domains)))


def test_a_domain_s_index_is_streamings_own(converted, as_before, tmp_path):
    for domain in DOMAINS:
        parts = sorted((as_before / 'train' / domain).glob('*/index.json'))
        merge_index([str(part) for part in parts], str(tmp_path / domain))
        merged = (tmp_path / domain / 'index.json').read_bytes()
        assert (converted[0] / 'train' / domain / 'index.json').read_bytes() == merged


def test_equal_data_have_the_fingerprint_that_they_had(converted, as_before):
    """Runs and stored studies name their data by it, and go on with the same data made again."""
    out, manifest = converted
    before = fingerprint(file_hashes(as_before))
    assert manifest['content_sha256'] == before != fingerprint(manifest['files'])
    old = {**manifest, 'files': file_hashes(as_before)}
    del old['content_sha256']
    (as_before / 'manifest.json').write_text(json.dumps(old))
    for data in (out, as_before):
        config = resolve('llama_tiny', [f'variables.data={data}', f'max_seq_len={SEQ_LEN}'])
        assert config.variables.data_manifest.content_sha256 == before


def test_relative_folders_and_odd_names(tmp_path, monkeypatch):
    """The index holds this conversion's rows, not an earlier one's."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    for lines in (60, 200):
        source = write_source(tmp_path / 'in', 'c#?', 'cat', lines)
        manifest = convert(source, '../out', seq_len=SEQ_LEN, validation_tokens=0, workers=1)
        rows = manifest['domains']['c#?']['train']['rows']
        assert rows > lines / 4 and len(rows_at(tmp_path / 'out/train/c#?')) == rows
        shutil.rmtree(tmp_path / 'out')
