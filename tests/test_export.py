"""Composer checkpoints as Hugging Face folders: with the package, without it, from shards, from foundry's callback."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from common.ranks import run_on_ranks
from common.shards import write_tokenizer
from composer import Trainer
from composer.optim import DecoupledAdamW
from composer.utils import dist
from llmfoundry.registry import callbacks as callback_registry
from llmfoundry.utils.builders import build_composer_model
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, pipeline

from itt_composer.atomic import atomic_folder, write_text
from itt_composer.evaluation import calibrate, sweep, tokens
from itt_composer.evaluation.harness import ITTLM
from itt_composer.evaluation.score import main as evaluate
from itt_composer.export import export
from itt_composer.export.check import check_exported
from itt_composer.export.checkpoint import find_checkpoint, read_checkpoint, read_config
from itt_composer.export.load import load, load_model, load_routed
from itt_composer.export.unpickle import check_names
from itt_composer.model import ITTForCausalLM, standalone, thinking_layers
from itt_composer.training.composer_model import ComposerITTForCausalLM

SHAPE = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    embedding_initializer_range=0.5,
)
FAMILIES = {
    'llama': SHAPE,
    'loop': dict(SHAPE, thinking='loop', thinking_steps=2),
    'itt': dict(SHAPE, thinking='itt', thinking_steps=2, router_initializer_range=0.1),
}
IDS = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(1))
CALLBACK_FOLDER = 'huggingface/ba2'


def train(family, runs, sharded=False):
    """Two batches with checkpoints in a run's layout, foundry's callback among them; the trained model's logits."""
    tokenizer = runs / f'tokenizer{os.environ.get("RANK", 0)}'
    write_tokenizer(tokenizer)
    torch.manual_seed(5)
    model = ComposerITTForCausalLM(AutoTokenizer.from_pretrained(tokenizer), **FAMILIES[family])
    if sharded:
        os.environ['FSDP_VERSION'] = '2'
    folder = runs / family / 'checkpoints'
    checkpointer = callback_registry.get('hf_checkpointer')(
        save_folder=str(folder), save_interval='2ba', precision='bfloat16' if family == 'itt' else 'float32'
    )
    rows = [{'input_ids': ids, 'labels': ids} for ids in IDS[: 4 if sharded else 2]]
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(rows, batch_size=1, sampler=dist.get_sampler(rows)),
        optimizers=DecoupledAdamW(model.parameters(), lr=1e-2),
        max_duration='2ba',
        callbacks=[] if sharded else [checkpointer],
        parallelism_config={'fsdp': {'state_dict_type': 'sharded'}} if sharded else None,
        precision='fp32',
        device='cpu',
        progress_bar=False,
        run_name=family,
        save_folder=str(folder),
        save_interval='2ba',
    )
    trainer.fit()
    inner = trainer.state.model.model
    with torch.no_grad():
        logits = inner.eval()(IDS).logits
    thresholds = {i: layer.threshold_T.tolist() for i, layer in thinking_layers(inner).items()}
    trainer.close()
    return logits.tolist(), thresholds


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Runs of all families, and what their models gave at the end."""
    runs = tmp_path_factory.mktemp('runs')
    with SummaryWriter(str(runs / 'tensorboard' / 'itt')) as events:
        for batch, loss in ((1, 5.0), (2, 1.25), (3, 0.5)):
            events.add_scalar('metrics/eval/arxiv/LanguageCrossEntropy', loss, batch)
    return runs, {family: train(family, runs) for family in FAMILIES}


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    runs, _ = trained
    out = tmp_path_factory.mktemp('exported')
    return {family: export(runs / family / 'checkpoints', out / family) for family in FAMILIES}


@pytest.mark.parametrize('family', FAMILIES)
def test_the_folder_holds_the_model(family, trained, exported):
    model = AutoModelForCausalLM.from_pretrained(exported[family])
    assert type(model) is (LlamaForCausalLM if family == 'llama' else ITTForCausalLM)
    logits, thresholds = trained[1][family]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, torch.tensor(logits), atol=1e-5, rtol=0)
    assert {i: layer.threshold_T.tolist() for i, layer in thinking_layers(model).items()} == thresholds
    tokenizer = AutoTokenizer.from_pretrained(exported[family])
    assert tokenizer.convert_tokens_to_ids('A') == 35 and tokenizer.eos_token_id == 2
    assert sorted(path.name for path in exported[family].parent.iterdir()) == sorted(FAMILIES)


def test_plain_is_llama_with_no_code_of_ours(exported):
    assert not list(exported['llama'].glob('*.py'))
    config = json.loads((exported['llama'] / 'config.json').read_text())
    assert config['model_type'] == 'llama' and config['architectures'] == ['LlamaForCausalLM']
    assert not {'auto_map', 'thinking', 'selection'} & set(config)


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    """A model that no checkpoint made, and the folder that ``save_pretrained`` wrote, as a Trainer calls it."""
    torch.manual_seed(2)
    gpt2 = GPT2LMHeadModel(GPT2Config(60, 64, 32, 4, 4, bos_token_id=1, eos_token_id=2, name_or_path='/there/gpt2'))
    options = dict(thinking_steps=2, router_initializer_range=0.1, step_encoding_init=0.1)
    model = ITTForCausalLM.from_pretrained_dense(gpt2, thinking='itt', **options).eval()
    folder = tmp_path_factory.mktemp('tuned')
    model.save_pretrained(folder)
    return model, folder


def test_without_the_package(trained, exported, tuned, tmp_path):
    """A bare interpreter: site-packages as a plain folder, so the editable install of this package is not in effect."""
    script = """
import json, sys
sys.path.append(sys.argv[1])
import torch
from transformers import AutoModelForCausalLM
try:
    import itt_composer
except ModuleNotFoundError:
    pass
else:
    sys.exit('the package is there')
ids, results = torch.tensor(json.loads(sys.argv[3])), {}
for name, folder in json.loads(sys.argv[2]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        results[name] = model(ids).logits, model.generate(ids, max_new_tokens=16, do_sample=False)
model.save_pretrained('again')
torch.save(results, sys.argv[4])
"""
    site_packages = str(Path(torch.__file__).parents[1])
    folders = {family: str(exported[family]) for family in ('loop', 'itt')} | {'tuned': str(tuned[1])}
    arguments = [site_packages, json.dumps(folders), json.dumps(IDS.tolist()), str(tmp_path / 'logits.pt')]
    done = subprocess.run(
        [sys.executable, '-I', '-S', '-c', script, *arguments],
        env={**os.environ, 'HF_MODULES_CACHE': str(tmp_path / 'modules')},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = {'tuned': tuned[0](IDS).logits} | {
            name: torch.tensor(logits) for name, (logits, _) in trained[1].items()
        }
    for name, (logits, ids) in torch.load(tmp_path / 'logits.pt').items():
        torch.testing.assert_close(logits, expected[name], atol=1e-5, rtol=0)
        model = AutoModelForCausalLM.from_pretrained(folders[name])
        assert torch.equal(ids, model.generate(IDS, max_new_tokens=16, do_sample=False))
        assert ids.shape[1] > IDS.shape[1]
    # What that machine saves has the code too.
    assert (tmp_path / 'again' / 'modeling_itt.py').read_text() == (tuned[1] / 'modeling_itt.py').read_text()
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / 'again')
        torch.testing.assert_close(again(IDS).logits, expected['tuned'], atol=1e-5, rtol=0)


@pytest.mark.parametrize('family', FAMILIES)
def test_foundrys_callback(family, trained):
    runs, results = trained
    folder = runs / family / 'checkpoints' / CALLBACK_FOLDER
    model = AutoModelForCausalLM.from_pretrained(folder)
    bfloat16 = family == 'itt'
    assert type(model) is (LlamaForCausalLM if family == 'llama' else ITTForCausalLM)
    assert (folder / 'modeling_itt.py').exists() == (family != 'llama')
    assert '| tokens | 48 |' in (folder / 'README.md').read_text()
    logits, thresholds = results[family]
    for i, layer in thinking_layers(model).items():
        assert layer.threshold_updates.dtype == torch.int64 and layer.threshold_updates == 2
        assert layer.threshold_T.tolist() == thresholds[i], 'the precision is that of the weights alone'
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, torch.tensor(logits), atol=1.0 if bfloat16 else 1e-5, rtol=0)
    AutoTokenizer.from_pretrained(folder)


def test_shards_of_two_ranks(tmp_path):
    logits, thresholds = run_on_ranks(2, train, 'itt', tmp_path, True)[0]
    whole = export(tmp_path / 'itt' / 'checkpoints' / 'ep0-ba2', tmp_path / 'exported')
    model = AutoModelForCausalLM.from_pretrained(whole)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, torch.tensor(logits), atol=1e-5, rtol=0)
    assert {i: layer.threshold_T.tolist() for i, layer in thinking_layers(model).items()} == thresholds
    assert AutoTokenizer.from_pretrained(whole).convert_tokens_to_ids('A') == 35
    # Foundry's link to the latest one has a name of its own for shards.
    checkpoints = tmp_path / 'itt' / 'checkpoints'
    (checkpoints / 'latest-rank0.pt').unlink()
    (checkpoints / 'latest-sharded-rank0').symlink_to('ep0-ba2')
    assert find_checkpoint(checkpoints) == (checkpoints / 'ep0-ba2').resolve()
    shard = next((checkpoints / 'ep0-ba2').glob('*.distcp'))
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ValueError, match='not a complete Composer checkpoint') as error:
        export(checkpoints, tmp_path / 'again')
    assert '\n' not in str(error.value)


def test_card_and_dtype(trained, tmp_path):
    runs, _ = trained
    out = export(runs / 'itt' / 'checkpoints' / 'latest-rank0.pt', tmp_path / 'itt', dtype=torch.bfloat16)
    card = (out / 'README.md').read_text()
    count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(out).parameters())
    assert f'| parameters | {count:,} |' in card
    assert '| batches | 2 |' in card
    # The evaluation after the checkpoint's batch is not this model's.
    assert '| arxiv | 1.2500 | 3.490 |' in card
    assert 'Trained with `selection: top_k`; used with `selection: threshold` (causal)' in card
    assert '| thinking layers (of 0 to 3) | 0, 2 |' in card
    config = json.loads((out / 'config.json').read_text())
    assert config['torch_dtype'] == 'bfloat16'
    assert (config['selection'], config['evaluation_selection']) == ('top_k', 'threshold')


def test_bad_input_is_named(trained, exported, tmp_path):
    runs, _ = trained
    checkpoint = runs / 'itt' / 'checkpoints' / 'ep0-ba2-rank0.pt'
    with pytest.raises(ValueError, match=r'nowhere.pt: no such checkpoint'):
        export(tmp_path / 'nowhere.pt', tmp_path / 'out')
    with pytest.raises(ValueError, match='a folder without weights'):
        export(runs, tmp_path / 'out')
    with pytest.raises(ValueError, match='already there; name another folder, or pass --overwrite'):
        export(checkpoint, exported['itt'])
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


def test_a_folder_that_is_read_must_hold_its_model(exported, tmp_path):
    """Transformers would fill what is missing with fresh weights, and every score of them would look like one."""
    for folder in exported.values():
        check_exported(folder)
    with pytest.raises(ValueError, match='no exported model in it'):
        check_exported(tmp_path)
    (tmp_path / 'config.json').write_text((exported['itt'] / 'config.json').read_text())
    with pytest.raises(ValueError, match='no weights'):
        check_exported(tmp_path)
    weights = load_file(exported['itt'] / 'model.safetensors')
    name = 'model.layers.1.mlp.up_proj.weight'
    save_file({**weights, name: weights[name][:-1].clone()}, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'up_proj.weight: expected shape \[48, 32\] by the config, got \[47, 32\]'):
        check_exported(tmp_path)
    del weights[name]
    save_file(weights, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'up_proj.weight is missing, which the model of this config has; '):
        load_routed(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes((tmp_path / 'model.safetensors').read_bytes()[:2000])
    with pytest.raises(ValueError, match='not a complete file of weights'):
        check_exported(tmp_path)


def own(folder):
    return (folder / 'weights').is_file()


def test_nothing_of_anybody_else_is_replaced(tmp_path, trained, monkeypatch):
    (tmp_path / 'work' / 'inner').mkdir(parents=True)
    (tmp_path / 'work' / 'notes.txt').write_text('mine')
    for out, message in ((tmp_path / 'work', 'holds something else'), (tmp_path / 'work' / 'notes.txt', 'a file')):
        with pytest.raises(ValueError, match=message), atomic_folder(out, own):
            pass
    monkeypatch.chdir(tmp_path / 'work' / 'inner')
    for out in (Path('.'), Path('..')):
        with pytest.raises(ValueError, match='the working directory is in it'), atomic_folder(out, lambda _: True):
            pass
    checkpoints = trained[0] / 'itt' / 'checkpoints'
    with pytest.raises(ValueError, match='the checkpoint is in it'):
        export(checkpoints, checkpoints, overwrite=True)
    assert (tmp_path / 'work' / 'notes.txt').read_text() == 'mine' and checkpoints.is_dir()
    for out, message in ((tmp_path / 'work', 'name a file'), (tmp_path / 'work' / 'notes.txt' / 'x', 'nothing can be')):
        with pytest.raises(ValueError, match=message):
            write_text('', out)
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['inner', 'notes.txt', 'work']


def test_a_pipeline_and_what_the_tokenizer_gives_fit_the_model(exported):
    text = pipeline('text-generation', model=str(exported['itt']), trust_remote_code=True, device='cpu')
    assert text('A', max_new_tokens=2)[0]['generated_text']
    for family in FAMILIES:
        model, tokenizer = (cls.from_pretrained(exported[family]) for cls in (AutoModelForCausalLM, AutoTokenizer))
        assert model.generate(**tokenizer('A', return_tensors='pt'), max_new_tokens=1).shape[1] > 1


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / 'out'
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, own) as folder:
        (folder / 'weights').write_text('half')
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for text in ('first', 'second'):
        with atomic_folder(out, own) as folder:
            (folder / 'weights').write_text(text)
    with pytest.raises(OSError), atomic_folder(out, own):
        raise OSError
    assert (out / 'weights').read_text() == 'second' and list(tmp_path.iterdir()) == [out]


def pickled(module, name, argument, protocol):
    """The call of a global with one text, as a pickle."""
    if protocol == 2:
        return (
            f'\x80\x02c{module}\n{name}\nX'.encode()
            + len(argument).to_bytes(4, 'little')
            + f'{argument}\x85R.'.encode()
        )
    texts = [b'\x8c' + bytes([len(text)]) + text.encode() for text in (module, name, argument)]
    return b'\x80\x04' + texts[0] + texts[1] + b'\x93' + texts[2] + b'\x85R.'


def in_archive(data):
    """What ``torch.save`` would have written of that pickle."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in (('data.pkl', data), ('version', b'3\n'), ('byteorder', b'little')):
            archive.writestr(f'archive/{name}', content)
    return buffer.getvalue()


CALLS = [('posix', 'system'), ('torch', 'os.system'), ('torch.serialization', 'os.system'), ('subprocess', 'getoutput')]


@pytest.mark.parametrize(('module', 'name'), CALLS)
@pytest.mark.parametrize('protocol', [2, 4])
def test_a_checkpoint_runs_no_code(module, name, protocol, tmp_path):
    call = pickled(module, name, f'touch {tmp_path}/ran', protocol)
    (tmp_path / 'one.pt').write_bytes(in_archive(call))
    (tmp_path / 'shards').mkdir()
    (tmp_path / 'shards' / '.metadata').write_bytes(call)
    for path in (tmp_path / 'one.pt', tmp_path / 'shards'):
        for read in (read_checkpoint, read_config, load_model):
            with pytest.raises(ValueError, match=path.name) as error:
                read(path)
            assert '\n' not in str(error.value)
        with pytest.raises(ValueError, match=path.name):
            check_names(path)
    assert not (tmp_path / 'ran').exists()


def test_objects_of_other_classes_are_inert(trained, tmp_path):
    """A stranger's callback may have a state of its own class; a call in its place is not made."""
    checkpoint = trained[0] / 'itt' / 'checkpoints' / 'ep0-ba2-rank0.pt'
    check_names(checkpoint)
    content = torch.load(checkpoint, weights_only=False)
    content['state']['callbacks'] = {'own': Call(subprocess.getoutput, f'touch {tmp_path}/ran')}
    torch.save(content, tmp_path / 'own.pt')
    assert read_checkpoint(tmp_path / 'own.pt').progress['token'] == 48
    with pytest.raises(ValueError, match=r'own.pt: reading it would call (subprocess|commands).getoutput'):
        check_names(tmp_path / 'own.pt')
    content['state']['callbacks'] = {'own': Call(os.system, f'touch {tmp_path}/ran')}
    torch.save(content, tmp_path / 'own.pt')
    with pytest.raises(ValueError, match=r'it names (posix|nt).system, which no checkpoint needs'):
        read_checkpoint(tmp_path / 'own.pt')
    assert not (tmp_path / 'ran').exists()


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, command):
        self.called = function, (command,)

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize('name', ['../out.json', '/tmp/out.json', '..', 'modeling_itt.py', 'a/b.json', '', 7])
def test_a_checkpoints_tokenizer_writes_tokenizer_files_only(name, trained, tmp_path):
    content = torch.load(trained[0] / 'itt' / 'checkpoints' / 'ep0-ba2-rank0.pt', weights_only=False)
    content['state']['integrations']['huggingface']['tokenizer'][name] = {'content': '{}'}
    torch.save(content, tmp_path / 'own.pt')
    with pytest.raises(ValueError, match='expected tokenizer files, got one called'):
        export(tmp_path / 'own.pt', tmp_path / 'out')
    assert [path.name for path in tmp_path.iterdir()] == ['own.pt']


def test_what_a_checkpoint_says_of_code_is_not_exported(trained, tmp_path):
    content = torch.load(trained[0] / 'itt' / 'checkpoints' / 'ep0-ba2-rank0.pt', weights_only=False)
    hugging_face = content['state']['integrations']['huggingface']
    hugging_face['model']['config']['content']['custom_pipelines'] = {'text-generation': {'impl': 'other/code--p.P'}}
    hugging_face['tokenizer']['tokenizer_config.json']['content']['auto_map'] = {'AutoTokenizer': 'other/code--t.T'}
    torch.save(content, tmp_path / 'own.pt')
    export(tmp_path / 'own.pt', tmp_path / 'out')
    assert not [file for file in (tmp_path / 'out').iterdir() if b'other/code' in file.read_bytes()]
    hugging_face['tokenizer']['config.json'] = {'content': {}}
    torch.save(content, tmp_path / 'own.pt')
    with pytest.raises(ValueError, match=r'a file called config.json, which the model has too'):
        export(tmp_path / 'own.pt', tmp_path / 'again')


@pytest.fixture
def shards(exported, tmp_path):
    """A folder with the weights in two files."""
    model = AutoModelForCausalLM.from_pretrained(exported['itt'])
    model.save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
    shutil.copy(exported['itt'] / 'tokenizer.json', tmp_path / 'shards')
    shutil.copy(exported['itt'] / 'tokenizer_config.json', tmp_path / 'shards')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 1
    check_exported(tmp_path / 'shards')
    return tmp_path / 'shards'


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
    said = set()
    for name, command in every_loader(shards).items():
        with pytest.raises((ValueError, SystemExit), match=message) as error:
            command()
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
def test_a_checkpoint_with_weights_that_are_no_numbers_is_refused(trained, tmp_path, change, message):
    content = torch.load(trained[0] / 'itt' / 'checkpoints' / 'ep0-ba2-rank0.pt', weights_only=False)
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


def test_a_folder_that_a_trainer_saved_is_exported(tuned, tmp_path, exported):
    model, folder = tuned
    out = export(folder, tmp_path / 'out', tokenizer=str(exported['itt']))
    card = (out / 'README.md').read_text()
    assert '| vocabulary | 60 |' in card and 'Made from the pretrained model `gpt2`' in card
    assert (out / 'tokenizer.json').is_file()
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out)(IDS).logits, model(IDS).logits)
    half = export(folder, tmp_path / 'half', torch.bfloat16)
    assert not (half / 'tokenizer.json').exists()
    again = load_file(export(half, tmp_path / 'half_again') / 'model.safetensors')
    assert again['model.norm.weight'].dtype == torch.bfloat16
    assert again['model.layers.0.threshold_T'].dtype == torch.float32
    with pytest.raises(ValueError, match='the checkpoint is in it'):
        export(half, half, overwrite=True)
    assert (half / 'model.safetensors').is_file()


def test_foundrys_own_model_takes_an_exported_folder(exported):
    model = build_composer_model(
        'hf_causal_lm',
        {
            'pretrained_model_name_or_path': str(exported['itt']),
            'pretrained': True,
            'trust_remote_code': True,
            'use_flash_attention_2': False,
        },
        tokenizer=AutoTokenizer.from_pretrained(exported['itt']),
    )
    batch = {'input_ids': IDS, 'labels': IDS, 'attention_mask': torch.ones_like(IDS)}
    loss = model.loss(model(batch), batch)
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ('second', 'message'),
    [
        ('def f(): pass', 'f is defined in other.a and in other.b'),
        ('from other import a\ndef g(f): return a.f(f)', r'line 2: f is also a name in this function'),
        ('from other import a\ndef g(): return a.missing()', 'missing is defined in no module'),
        ('import other.a', 'write "from other import'),
        (
            'from other import a\nfrom os.path import join as f\ndef g(): return a.f(1)',
            'f is defined in other.a and imported in other.b',
        ),
        ('from other.a import f as h', 'f is imported under another name'),
    ],
)
def test_what_one_file_cannot_hold_is_refused(second, message, tmp_path, monkeypatch):
    package = tmp_path / 'other'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / 'a.py').write_text('def f(x):\n    return x\n')
    (package / 'b.py').write_text(f'from other.a import f\n{second}' if second == 'def f(): pass' else second)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(standalone, 'PACKAGE', 'other')
    for name in [name for name in sys.modules if name.split('.')[0] == 'other']:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=message):
        standalone.modeling_source('other.b')
