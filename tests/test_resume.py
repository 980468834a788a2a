"""What a run continues from, and that its manifest says what was trained."""

from __future__ import annotations

import io
import json
import shutil
import zipfile

import pytest
import torch
from common.disturbed_runs import CONSTANT, checkpoints, state, two_domains
from common.shards import write_data
from common.tiny_runs import tiny_config
from omegaconf import OmegaConf

from itt_composer.training.checkpoints import settle
from itt_composer.training.manifest import recorded
from itt_composer.training.resume import data_sha256, differences
from itt_composer.training.run import train as train_config
from itt_composer.training.run_error import RunError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp('data'))


@pytest.fixture
def train(data, tmp_path):
    return lambda *overrides: train_config(tiny_config(data, tmp_path, 'run_name=r', *overrides))


def manifest(folder):
    return json.loads((folder / 'manifest.json').read_text())


@pytest.fixture(scope='module')
def changes(data):
    """By what a run with overrides differs from the one without."""
    record = {'config': OmegaConf.to_container(tiny_config(data, data.parent))}
    return lambda *overrides: differences(record, tiny_config(data, data.parent, *overrides))


def test_the_manifest_names_environment_variables_without_their_values(data, tmp_path, monkeypatch):
    monkeypatch.setenv('ITT_KEY', 'hunter2/key')
    monkeypatch.setenv('ITT_NORM', 'tanh')
    keys = ['loggers.mlflow={tags: {key: "${oc.env:ITT_KEY}"}}', 'model.weight_norm=${oc.env:ITT_NORM}']
    config = tiny_config(data, tmp_path, *keys)
    assert config.loggers.mlflow.tags.key == 'hunter2/key' and config.model.weight_norm == 'tanh'
    written = recorded(config)
    assert 'hunter2' not in json.dumps(written)
    assert written['loggers']['mlflow']['tags']['key'].startswith('${oc.env:ITT_KEY}#')
    # What is trained is still compared.
    assert differences({'config': written}, tiny_config(data, tmp_path, *keys)) == {}
    monkeypatch.setenv('ITT_NORM', 'sigmoid')
    assert list(differences({'config': written}, tiny_config(data, tmp_path, *keys))) == ['model.weight_norm']


def test_what_may_differ(changes):
    assert not changes(
        *('max_duration=320ba', 'save_interval=5ba', 'eval_interval=7ba', 'device_train_microbatch_size=1'),
        *('callbacks.causal_gap=null', 'callbacks.memory_monitor={}', 'loggers.inmemory={}'),
        *('train_loader.num_workers=2', 'model.attention_backend=sdpa', 'fsdp_config.sharding_strategy=FULL_SHARD'),
        *('eval_loader=null', 'save_num_checkpoints_to_keep=3'),
        *('model.combine=weighted', 'model.router_temperature=1.0', 'model.autocast_residual=false'),  # their defaults
        'optimizer={name: decoupled_adamw, lr: 3e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0}',
    )
    assert not changes('loggers=null', 'variables.merged_validation=true')
    # Its evaluations decide from which domains the batches are.
    weighs = 'callbacks.dynamic_batch_loading={targets: {arxiv: 1.0, wiki: 1.0}}'
    assert 'eval_interval' in changes(weighs, 'eval_interval=7ba')


def test_what_may_not_differ(changes):
    overrides = {
        'optimizer.lr': '1e-5',
        'optimizer.weight_decay': '0.1',
        'model.combine': 'delta',
        'model.autocast_residual': 'true',
        'model.hidden_size': '64',
        'seed': '18',
        'global_train_batch_size': '8',
        'max_seq_len': '16',
        'precision': 'amp_bf16',
        'fsdp_config.mixed_precision': 'PURE',
        'scheduler.t_warmup': '3ba',
        'algorithms.gradient_clipping.clipping_threshold': '0.5',
        'callbacks.layer_freezing.layer_names': '[x]',
    }
    one_domain = 'variables.proportions={arxiv: 1, wiki: 0}'
    found = changes(one_domain, *(f'{key}={value}' for key, value in overrides.items()))
    # A seed, a length, a batch and a domain stand in other keys too.
    others = (
        *('train_loader.dataset.shuffle_seed', 'train_loader.dataset.max_seq_len', 'train_loader.dataset.epoch_size'),
        *('model.max_position_embeddings', 'tokenizer.kwargs.model_max_length'),
        *('train_loader.dataset.streams.arxiv.proportion', 'train_loader.dataset.streams.wiki.local'),
    )
    assert found.keys() == {*overrides, *others}


def test_data_are_the_same_wherever_they_lie(data, tmp_path):
    copied = shutil.copytree(data, tmp_path / 'copied')
    config, moved = (tiny_config(folder, tmp_path) for folder in (data, copied))
    record = {'config': OmegaConf.to_container(config), 'data_sha256': 'x'}
    assert 'data fingerprint' in differences(record, config)
    record['data_sha256'] = data_sha256(record['config'])
    assert differences(record, config) == differences(record, moved) == {}
    shutil.rmtree(copied)
    write_data(copied, {'arxiv': 64, 'wiki': 40}, {'arxiv': 4, 'wiki': 4}, seed=1)
    assert 'data fingerprint' in differences(record, tiny_config(copied, tmp_path))


def test_another_rate_is_refused_or_used_and_recorded(train, tmp_path, capsys):
    train(CONSTANT, 'max_duration=2ba', 'optimizer.lr=1e-3')
    first = (tmp_path / 'r' / 'manifest.json').read_text()
    for override in ('optimizer.lr=1e-5', 'model.hidden_size=64'):
        with pytest.raises(RunError, match=r'\(was .*, got .*\).*run_name=.*resume_with_changes') as refused:
            train(CONSTANT, 'max_duration=4ba', override)
        assert override.split('=')[0] in str(refused.value) and '\n' not in str(refused.value)
    # The checkpoint brings its own seed, and does not fit another width.
    with pytest.raises(RunError, match=r'seed \(was 17, got 18\)'):
        train(CONSTANT, 'max_duration=4ba', 'seed=18', 'resume_with_changes=true')
    with pytest.raises(RuntimeError, match='size mismatch'):
        train(CONSTANT, 'max_duration=4ba', 'model.hidden_size=64', 'resume_with_changes=true')
    with pytest.raises(RunError, match='has checkpoints of an earlier start'):
        train(CONSTANT, 'max_duration=4ba', 'optimizer.lr=1e-5', 'autoresume=false')
    (tmp_path / 'sharded' / 'checkpoints' / 'ep0-ba7').mkdir(parents=True)
    with pytest.raises(RunError, match='sharded/checkpoints: has checkpoints of an earlier start'):
        train('run_name=sharded', 'autoresume=false')
    path = f'load_path={tmp_path}/r/checkpoints/latest-rank0.pt'
    with pytest.raises(RunError, match=r'optimizer.lr \(was 0.001, got 1e-05\)'):
        train(CONSTANT, 'max_duration=4ba', 'optimizer.lr=1e-5', 'autoresume=false', path)
    assert (tmp_path / 'r' / 'manifest.json').read_text() == first
    capsys.readouterr()
    changed = [CONSTANT, 'optimizer.lr=1e-5', 'optimizer.betas=[0.5, 0.9]']
    train(*changed, 'max_duration=4ba', 'resume_with_changes=true')
    assert 'continues from ep0-ba2-rank0.pt with optimizer.lr: 1e-05 instead of 0.001' in capsys.readouterr().out
    (group,) = state(tmp_path / 'r')['optimizers']['DecoupledAdamW']['param_groups']
    assert (group['lr'], group['initial_lr'], tuple(group['betas'])) == (1e-5, 1e-5, (0.5, 0.9))
    said = manifest(tmp_path / 'r')
    (before,) = said['before']
    assert (before['until_batch'], before['config']) == (2, json.loads(first)['config'])
    assert said['config']['optimizer']['lr'] == 1e-5 and 'resume_with_changes' not in said['config']
    train(*changed, 'max_duration=6ba')  # It is this run's config now.
    assert [part['until_batch'] for part in manifest(tmp_path / 'r')['before']] == [2, 4]


def test_another_checkpoint_than_the_run_continues_from(train, tmp_path):
    train(CONSTANT, 'max_duration=2ba', 'save_interval=1ba', 'save_num_checkpoints_to_keep=-1')
    first = f'load_path={tmp_path}/r/checkpoints/ep0-ba1-rank0.pt'
    with pytest.raises(RunError, match=r'load_path: .*ba1-rank0.pt, but .* newest checkpoint, ep0-ba2-rank0.pt'):
        train(CONSTANT, 'max_duration=4ba', first)
    weights = ('run_name=weights', CONSTANT, 'save_weights_only=true', 'save_overwrite=true')
    train(*weights, 'max_duration=2ba')
    with pytest.raises(
        RunError, match=r'to continue from batch 2, and Composer has loaded batch 0; .*save_weights_only'
    ):
        train(*weights, 'max_duration=4ba')


def test_a_checkpoint_that_cannot_be_resumed(train, tmp_path, capsys):
    train(CONSTANT, 'max_duration=4ba', 'save_num_checkpoints_to_keep=-1')
    folder = tmp_path / 'r' / 'checkpoints'
    good, newest = folder / 'ep0-ba2-rank0.pt', folder / 'ep0-ba4-rank0.pt'
    content = newest.read_bytes()

    broken = torch.load(newest, weights_only=False)
    next(iter(broken['state']['model'].values())).flatten()[0] = float('inf')
    torch.save(broken, newest)
    assert settle(folder) == good and 'not finite' in (said := capsys.readouterr().out) and good.name in said
    assert checkpoints(tmp_path / 'r') == ['damaged-ep0-ba4-rank0.pt', good.name]

    # A bit of a weight, which PyTorch itself would load.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        weight = max(archive.infolist(), key=lambda record: record.file_size)
    place = weight.header_offset + weight.compress_size // 2
    newest.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert settle(folder) == good and 'damaged' in capsys.readouterr().out
    assert (folder / 'latest-rank0.pt').resolve() == good.resolve()

    newest.write_bytes(content[:5000])
    assert settle(folder) == good and checkpoints(tmp_path / 'r') == ['damaged-ep0-ba4-rank0.pt', good.name]

    good.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(RunError, match=r'ep0-ba2-rank0\.pt: damaged.*no earlier checkpoint'):
        train(CONSTANT, 'max_duration=6ba')
    good.write_bytes(content[:5000])
    assert settle(folder) is None and not (folder / 'latest-rank0.pt').is_symlink()


def test_a_start_from_rank_0s_file_under_composers_name_of_it(train, tmp_path):
    train(CONSTANT, 'max_duration=2ba', 'optimizer.lr=0')
    path = f'load_path={tmp_path}/r/checkpoints/latest-rank{{rank}}.pt'
    train(CONSTANT, 'max_duration=2ba', 'optimizer.lr=0', path, 'run_name=other', 'load_weights_only=true', 'seed=18')
    first, other = (state(tmp_path / name)['model'] for name in ('r', 'other'))
    assert all(torch.equal(first[name], other[name]) for name in first if name.endswith('weight'))
    train(CONSTANT, 'max_duration=4ba', 'optimizer.lr=0', path, 'autoresume=false')
    assert checkpoints(tmp_path / 'r') == ['ep0-ba4-rank0.pt']


def test_no_checkpoint_to_start_from_is_one_line(train, tmp_path):
    train(CONSTANT, 'max_duration=4ba', 'save_num_checkpoints_to_keep=-1')
    folder = tmp_path / 'r' / 'checkpoints'
    (tmp_path / 'foreign.pt').write_bytes(b'PK')
    (folder / 'ep0-ba4-rank0.pt').write_bytes(b'PK')
    for path in (tmp_path / 'foreign.pt', folder / 'ep0-ba4-rank0.pt', folder):
        with pytest.raises(RunError, match=f'{path}: not a complete checkpoint.*; .*another') as error:
            train(CONSTANT, 'max_duration=6ba', 'autoresume=false', f'load_path={path}')
        assert '\n' not in str(error.value)


def test_a_run_of_version_0_1_goes_on(train, tmp_path):
    """There the block of a thinking layer was called ``f``, in the weights and in the states of the optimizer."""

    def old(part):
        if isinstance(part, dict):
            return {old(key): old(value) for key, value in part.items()}
        if isinstance(part, list):
            return [old(value) for value in part]
        return part.replace('.block.', '.f.') if isinstance(part, str) else part

    train(CONSTANT, 'max_duration=4ba', 'save_num_checkpoints_to_keep=-1')
    straight, folder = state(tmp_path / 'r')['model'], tmp_path / 'r' / 'checkpoints'
    (folder / 'ep0-ba4-rank0.pt').unlink()
    content = torch.load(folder / 'ep0-ba2-rank0.pt', weights_only=False)
    torch.save(old(content), folder / 'ep0-ba2-rank0.pt')
    assert '.f.' in str(list(torch.load(folder / 'ep0-ba2-rank0.pt', weights_only=False)['state']['model']))
    with pytest.warns(FutureWarning, match='old name `f`'):
        train(CONSTANT, 'max_duration=4ba')
    went_on = state(tmp_path / 'r')['model']
    assert all(torch.equal(went_on[name], weight) for name, weight in straight.items())
