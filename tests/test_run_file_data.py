"""What a training config takes from the data folder: streams, proportions, lengths; and what the data refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from common.run_files import YAMLS, resolve_error, tiny_overrides, two_domains
from common.shards import TOKENS, write_data
from omegaconf import OmegaConf

from itt_composer.config.run_file import resolve

pytestmark = pytest.mark.usefixtures('elsewhere')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return two_domains(tmp_path_factory.mktemp('data'))


@pytest.fixture
def tiny(data, tmp_path) -> list[str]:
    return tiny_overrides(data, tmp_path)


def test_streams_follow_the_domains(data, tiny):
    config = resolve(YAMLS / 'itt_x4_tiny.yaml', tiny)
    streams = OmegaConf.to_container(config.train_loader.dataset.streams)
    assert streams == {d: {'local': str(data / 'train' / d)} for d in ('arxiv', 'wiki')}
    assert [(loader.label, loader.dataset.local) for loader in config.eval_loader] == [
        ('arxiv', str(data / 'validation' / 'arxiv'))
    ]
    assert (config.model.vocab_size, config.model.bos_token_id, config.model.eos_token_id) == (len(TOKENS), 1, 2)
    weighted = resolve(YAMLS / 'itt_x4_tiny.yaml', [*tiny, 'variables.proportions={arxiv: 3, wiki: 1}'])
    assert {d: s.proportion for d, s in weighted.train_loader.dataset.streams.items()} == {'arxiv': 3.0, 'wiki': 1.0}
    without = resolve(YAMLS / 'itt_x4_tiny.yaml', [*tiny, 'variables.proportions={arxiv: 1, wiki: 0, cc: 0}'])
    assert list(without.train_loader.dataset.streams) == ['arxiv']


def test_a_remote_is_streamed_through_the_local_cache():
    remote = ['variables.remote=s3://bucket/redpajama/', 'variables.data=./cache']
    # An epoch must be whole batches, and here nothing says how many rows there are.
    assert 'copy it there' in resolve_error('llama_162m', *remote)
    assert 'multiple' in resolve_error('llama_162m', *remote, 'train_loader.dataset.epoch_size=1000')
    config = resolve(YAMLS / 'llama_162m.yaml', [*remote, 'train_loader.dataset.epoch_size=25600'])
    assert config.train_loader.dataset.streams['c4-rp'] == {
        'local': 'cache/train/c4-rp',
        'remote': 's3://bucket/redpajama/train/c4-rp',
        'proportion': 0.15,
    }
    assert config.eval_loader[1].dataset.remote == 's3://bucket/redpajama/validation/c4-rp'


def test_foundrys_loaders_read_the_streams_in_the_mix_asked_for(tiny):
    import numpy as np
    from llmfoundry.data.dataloader import build_dataloader
    from llmfoundry.utils.builders import build_eval_loaders, build_tokenizer

    overrides = [*tiny, 'variables.proportions={arxiv: 1, wiki: 1}']
    config = OmegaConf.to_container(resolve(YAMLS / 'itt_x4_tiny.yaml', overrides))
    tokenizer = build_tokenizer(config['tokenizer']['name'], config['tokenizer']['kwargs'])
    train = build_dataloader(config['train_loader'], tokenizer, 16).dataloader
    evaluators = build_eval_loaders(config['eval_loader'], tokenizer, 4)
    batches = list(train)
    assert all(batch['input_ids'].shape == (16, 32) for batch in batches)
    # 32 rows of wiki must be repeated to make up half of an epoch of 128 rows.
    wiki = {tuple(row) for row in _rows(train.dataset, stream=1)}
    seen = [tuple(row) for batch in batches for row in batch['input_ids'].tolist()]
    assert len(seen) == 128
    assert np.mean([row in wiki for row in seen]) == pytest.approx(0.5, abs=0.02)
    assert [evaluator.label for evaluator in evaluators] == ['eval/arxiv']
    assert sum(len(batch['input_ids']) for batch in evaluators[0].dataloader.dataloader) == 5


def _rows(dataset, stream: int) -> list[list[int]]:
    first = sum(dataset.samples_per_stream[:stream])
    return [dataset[first + i].tolist() for i in range(dataset.samples_per_stream[stream])]


@pytest.mark.parametrize(
    ('overrides', 'words'),
    [
        (['variables.proportions={arxiv: 1, wikipedia: 1, wiki: 0}'], ["'wikipedia'", "did you mean 'wiki'"]),
        (['variables.proportions={arxiv: 1}'], ["'wiki'", 'variables.proportions.wiki=0']),
        (['variables.proportions={arxiv: 0, wiki: 0}'], ['expected a number above 0 for at least one domain']),
        (['max_seq_len=64'], ['max_seq_len: 64', '32 tokens', '--seq-len 64']),
        (['model.vocab_size=10'], [f'model.vocab_size: expected at least {len(TOKENS)}', 'got 10']),
        (['save_interval=1ep'], ['save_interval: expected batches', '1000ba', 'got 1ep']),
        (['save_interval=1'], ['save_interval: expected batches', '1000ba', 'got 1:']),
    ],
)
def test_mistakes_that_the_data_shows(tiny, overrides, words):
    message = resolve_error('itt_x4_tiny', *tiny, *overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize('size', ['1000', '1k'])
def test_an_epoch_that_a_resumed_run_would_not_repeat(size, tiny):
    message = resolve_error('itt_x4_tiny', *tiny, f'train_loader.dataset.epoch_size={size}')
    assert all(word in message for word in ('epoch_size: 1', 'no multiple of 64', 'set 960')), message


def test_a_domain_without_rows(tmp_path):
    data = write_data(tmp_path, {'arxiv': 4, 'wiki': 0}, {})
    message = resolve_error('llama_tiny', f'variables.data={data}', 'max_seq_len=32')
    assert 'wiki' in message and 'no sequences' in message


def test_dynamic_batch_loading_is_one_part_and_off_without_it(tiny):
    assert 'dynamic_batch_loading' not in resolve(YAMLS / 'itt_x4_tiny.yaml', tiny).callbacks
    targets = 'callbacks.dynamic_batch_loading.targets={arxiv: 2.0, wiki: 2.0}'
    config = resolve(YAMLS / 'itt_x4_tiny.yaml', [*tiny, 'parts.loading=dynamic', targets])
    assert config.callbacks.dynamic_batch_loading.targets == {'arxiv': 2.0, 'wiki': 2.0}
    # An epoch of the loader ends with each evaluation.
    assert config.eval_interval == '1ep'
    assert resolve(YAMLS / 'itt_x4_tiny.yaml', [*tiny, 'parts.loading=dynamic', targets, 'save_interval=1ep'])
    assert config.train_loader.dataset.epoch_size % 256 == 0
    assert not config.train_loader.persistent_workers
