"""Checkpoints and folders that are damaged or incomplete are refused in one line, whatever reads them."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from itt_composer.evaluation import calibrate, sweep, tokens
from itt_composer.evaluation.harness import ITTLM
from itt_composer.evaluation.score import main as evaluate
from itt_composer.export.check import check_exported
from itt_composer.export.folder import export
from itt_composer.export.load import load


@pytest.fixture(scope='module')
def folder(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp('exported') / 'itt')


def test_bad_input_is_named(checkpoint, folder, tmp_path):
    runs = checkpoint.parents[2]
    with pytest.raises(ValueError, match=r'nowhere.pt: no such checkpoint'):
        export(tmp_path / 'nowhere.pt', tmp_path / 'out')
    with pytest.raises(ValueError, match='a folder without weights'):
        export(runs, tmp_path / 'out')
    with pytest.raises(ValueError, match='already there; name another folder, or pass --overwrite'):
        export(checkpoint, folder)
    with pytest.raises(ValueError, match='no such TensorBoard folder'):
        export(checkpoint, tmp_path / 'out', tensorboard=tmp_path / 'events')

    (tmp_path / 'cut.pt').write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ValueError, match='not a complete Composer checkpoint'):
        export(tmp_path / 'cut.pt', tmp_path / 'out')
    torch.save({'state': {'model': {}}}, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match='no model in it'):
        export(tmp_path / 'other.pt', tmp_path / 'out')

    whole = torch.load(checkpoint, weights_only=False)
    weights = whole['state']['model']
    name = 'model.model.layers.1.mlp.up_proj.weight'
    weights[name] = weights[name][:-1]
    torch.save(whole, tmp_path / 'shape.pt')
    with pytest.raises(ValueError, match=r'up_proj.weight: expected shape \[48, 32\] by the config, got \[47, 32\]'):
        export(tmp_path / 'shape.pt', tmp_path / 'out')
    del weights[name]
    whole['state']['integrations']['huggingface']['tokenizer'] = {}
    torch.save(whole, tmp_path / 'missing.pt')
    with pytest.raises(ValueError, match='no tokenizer in it; pass --tokenizer'):
        export(tmp_path / 'missing.pt', tmp_path / 'out')
    with pytest.raises(ValueError, match=r'up_proj.weight is missing, which the model of this config has; '):
        export(tmp_path / 'missing.pt', tmp_path / 'out', tokenizer=str(runs / 'tokenizer0'))
    with pytest.raises(ValueError, match=r'tokenizer .*nothing: '):
        export(checkpoint, tmp_path / 'out', tokenizer=str(tmp_path / 'nothing'))
    assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('.out*'))
    with pytest.raises(ValueError, match='the checkpoint is in it'):
        export(checkpoint.parent, checkpoint.parent, overwrite=True)
    assert checkpoint.is_file()


def test_a_folder_that_is_read_must_hold_its_model(folder, tmp_path):
    """Transformers would fill what is missing with fresh weights, and every score of them would look like one."""
    check_exported(folder)
    with pytest.raises(ValueError, match='no exported model in it'):
        check_exported(tmp_path)
    (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
    with pytest.raises(ValueError, match='no weights'):
        check_exported(tmp_path)


@pytest.fixture(scope='module')
def sharded(folder, tmp_path_factory):
    """A folder with the weights in several files."""
    out = tmp_path_factory.mktemp('sharded')
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, max_shard_size='20KB')
    shutil.copy(folder / 'tokenizer.json', out)
    shutil.copy(folder / 'tokenizer_config.json', out)
    assert len(list(out.glob('*.safetensors'))) > 1
    check_exported(out)
    return out


@pytest.fixture
def shards(sharded, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(sharded, tmp_path / 'shards')


def every_loader(folder):
    return {
        'export': lambda: export(folder, folder.parent / 'out'),
        'pictures': lambda: load(folder),
        'tokens': lambda: tokens.main(folder, 'some text', out=folder.parent / 'page.html'),
        'calibrate': lambda: calibrate.main(folder, folder.parent, ['0.5/0.5']),
        'sweep': lambda: sweep.main(folder, folder.parent),
        'lm-eval': lambda: ITTLM(str(folder), device='cpu'),
        'eval': lambda: evaluate([folder], out=folder.parent / 'eval'),
    }


def missing(folder):
    next(folder.glob('*-00001-*.safetensors')).unlink()


def cut(folder):
    file = next(folder.glob('*-00001-*.safetensors'))
    os.truncate(file, file.stat().st_size // 2)


def empty(folder):
    os.truncate(next(folder.glob('*-00001-*.safetensors')), 0)


def outside(folder):
    index = folder / 'model.safetensors.index.json'
    index.write_text(index.read_text().replace('model-00001', '../model-00001'))


def damaged_index(folder):
    (folder / 'model.safetensors.index.json').write_text('{"weight_map": 3')


def change(folder, edit):
    file = next(folder.glob('*-00001-*.safetensors'))
    weights = load_file(file)
    edit(weights, next(name for name, weight in weights.items() if weight.ndim == 2))
    save_file(weights, file, metadata={'format': 'pt'})


def drop(folder):
    change(folder, lambda weights, name: weights.pop(name))


def other_shape(folder):
    change(folder, lambda weights, name: weights.update({name: weights[name][:-1].clone()}))


def nan(folder):
    change(folder, lambda weights, name: weights[name][0].fill_(float('nan')))


def infinite(folder):
    change(folder, lambda weights, name: weights[name][0, :1].fill_(float('-inf')))


def eight_bits(folder):
    change(folder, lambda weights, name: weights.update({name: weights[name].to(torch.float8_e4m3fn)}))


def odd_config(folder):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'pruned_heads': {'0': [1]}}))


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (missing, r'model-00001-of-0000\d.safetensors is missing, which model.safetensors.index.json names'),
        (cut, 'not a complete file of weights'),
        (empty, 'not a complete file of weights'),
        (outside, r"expected names of files in the folder, got '../model-00001"),
        (damaged_index, 'no index of weights'),
        (drop, r'weight \S+ is missing, which the model of this config has; copy the folder again'),
        (other_shape, r'weight \S+: expected shape \[\d+, \d+\] by the config, got'),
        (nan, r'weight \S+: expected finite numbers, got nan in 32 of'),
        (infinite, r'weight \S+: expected finite numbers, got -inf in 1 of'),
        (eight_bits, r'weight \S+: expected dense numbers, got a tensor of torch.float8_e4m3fn; copy'),
        (odd_config, r'config.json: not a config that is known here \(.*prune_heads'),
    ],
)
def test_every_command_checks_the_model_the_same_way(damage, message, shards):
    damage(shards)
    commands, said = every_loader(shards), set()
    # All read a folder through one function, so that two damages are enough to see that each command calls it.
    for name in commands if damage in (missing, nan) else ('pictures', 'lm-eval'):
        with pytest.raises((ValueError, SystemExit), match=message) as error:
            commands[name]()
        assert '\n' not in str(error.value), name
        said.add(str(error.value).split(': ', isinstance(error.value, SystemExit))[-1])
    assert len(said) == 1, 'one message, whatever the command'
    assert [path.name for path in shards.parent.iterdir() if path.name != 'model'] == ['shards']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda x: x.index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(float('nan'))),
            'got nan in 1 of 1920',
        ),
        (lambda x: x.to_sparse(), r'expected dense numbers, got a tensor of torch\.sparse_coo'),
        (lambda x: x.to('meta'), 'expected dense numbers, got a tensor of meta'),
        (lambda x: x.to(torch.complex64), r'expected dense numbers, got a tensor of torch\.complex64'),
        (lambda x: x.int(), r'expected torch\.float32, got whole numbers'),
    ],
)
def test_a_checkpoint_with_weights_that_are_no_numbers_is_refused(checkpoint, tmp_path, change, message):
    content = torch.load(checkpoint, weights_only=False)
    weights = content['state']['model']
    weights['model.lm_head.weight'] = change(weights['model.lm_head.weight'])
    torch.save(content, tmp_path / 'odd.pt')
    for command in (lambda: export(tmp_path / 'odd.pt', tmp_path / 'out'), lambda: load(tmp_path / 'odd.pt')):
        with pytest.raises(ValueError, match=rf'lm_head.weight: .*{message}'):
            command()
    content['state']['model'] = {3: torch.ones(2)}
    torch.save(content, tmp_path / 'odd.pt')
    with pytest.raises(ValueError, match='no model in it'):
        load(tmp_path / 'odd.pt')
