"""What lies in a data folder is checked before a training begins: one line that names the file."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from common.shards import write_data

from data_prep.manifest import write_manifest
from itt_composer.config.run_file import resolve
from itt_composer.training.preflight import Machine, problems

HERE = Machine(world_size=1, local_world_size=1, local_rank=0, gpus=0)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp('data'), {'arxiv': 40, 'merged': 40}, {'arxiv': 4, 'merged': 4})
    shards = [
        {**shard, 'raw_data': {**shard['raw_data'], 'basename': f'{domain}/{shard["raw_data"]["basename"]}'}}
        for domain in ('arxiv', 'merged')
        for shard in json.loads((data / 'validation' / domain / 'index.json').read_text())['shards']
    ]
    (data / 'validation/index.json').write_text(json.dumps({'version': 2, 'shards': shards}))
    counts = {'train': {'rows': 40}, 'validation': {'rows': 4}}
    write_manifest(
        data,
        {
            **{'settings': {'seq_len': 32}, 'tokenizer': {}, 'versions': {}, 'bad_lines': []},
            **{'domains': {'arxiv': counts, 'merged': counts}, 'source': {'folder': '/', 'files': []}},
        },
    )
    return data


@pytest.fixture
def data(written, tmp_path):
    return shutil.copytree(written, tmp_path / 'data')


def resolved(data, *overrides):
    return resolve('llama_tiny', [f'variables.data={data}', 'max_seq_len=32', *overrides])


def error(data):
    """What a start says, in one line."""
    try:
        found = problems(resolved(data), HERE)
    except ValueError as problem:
        found = [str(problem)]
    assert len(found) == 1 and len(found[0].splitlines()) == 1, found
    return found[0]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


SHARD = 'train/arxiv/shard.00000.mds'
FAULTS = [
    (cut, SHARD, 'expected'),
    (Path.unlink, 'validation/merged/shard.00000.mds', 'missing'),
    (flip, SHARD, 'changed since'),
    (cut, 'train/arxiv/index.json', 'changed since'),
    (Path.unlink, 'validation/merged/index.json', 'missing'),
    (cut, 'tokenizer/tokenizer.json', 'no tokenizer that can be loaded'),
    (cut, 'tokenizer/tokenizer_config.json', 'not a JSON file'),
    (Path.unlink, 'tokenizer/tokenizer_config.json', 'missing'),
    (cut, 'manifest.json', 'not a JSON file'),
    (shutil.rmtree, 'validation/arxiv', 'missing'),
    (lambda path: path.write_text('{"a": 1}'), 'manifest.json', 'not a manifest'),
]


def test_a_folder_without_damage(written):
    assert not problems(resolved(written), HERE)


@pytest.mark.parametrize(('fault', 'name', 'words'), FAULTS)
def test_a_damaged_file_is_named(data, fault, name, words):
    fault(data / name)
    message = error(data)
    assert f'{data}/{name}' in message and words in message


@pytest.mark.parametrize('content', ['{"sha', '[]', '{}', '{"shards": [{}]}', '{"shards": 1}'])
def test_an_index_of_something_else_is_named(data, content):
    (data / 'manifest.json').unlink()
    (data / 'train/arxiv/index.json').write_text(content)
    assert f'{data}/train/arxiv/index.json' in error(data)


def test_a_home_folder_in_the_path(data, monkeypatch):
    monkeypatch.setenv('HOME', str(data.parent))
    config = resolved('~/data')
    assert config.train_loader.dataset.streams.arxiv.local == f'{data}/train/arxiv'
    assert config.tokenizer.name == f'{data}/tokenizer'


def test_a_domain_called_merged_keeps_its_evaluation_set(data):
    loaders = resolved(data, 'variables.merged_validation=true').eval_loader
    assert {loader.label: loader.dataset.local.removeprefix(f'{data}/') for loader in loaders} == {
        'arxiv': 'validation/arxiv',
        'merged': 'validation/merged',
        'merged_domains': 'validation',
    }


def test_the_mean_over_domains_leaves_the_merged_set_out(data):
    config = resolved(data, 'variables.merged_validation=true')
    assert config.callbacks.domain_mean.domains == ['arxiv', 'merged']
    assert 'domain_mean' not in resolved(data, 'callbacks.domain_mean=null').callbacks


@pytest.mark.parametrize('length', [16, 32])
def test_a_sequence_length_below_that_of_the_data_is_said(data, caplog, length):
    with caplog.at_level(logging.WARNING):
        resolved(data, f'max_seq_len={length}')
    said = [message for message in caplog.messages if 'max_seq_len: 16' in message and '32 tokens' in message]
    assert len(said) == (length == 16)


@pytest.mark.parametrize('token', ['bos_token', 'eos_token', 'unk_token'])
def test_padding_that_stands_in_the_data_is_taken_out(data, token):
    """Of data made elsewhere: the loss leaves out what equals the padding token."""
    file = data / 'tokenizer/tokenizer_config.json'
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, 'pad_token': saved[token]}))
    kwargs = resolved(data).tokenizer.kwargs
    assert ('pad_token' in kwargs) == (token != 'unk_token')
    assert kwargs.get('pad_token') is None and kwargs.model_max_length == 32
