"""Composer checkpoints as Hugging Face folders: with the package, without it, from shards, from foundry's callback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.ranks import run_on_ranks
from common.shards import write_tokenizer
from composer import Trainer
from composer.optim import DecoupledAdamW
from composer.utils import dist
from llmfoundry.registry import callbacks as callback_registry
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from itt_composer.atomic import atomic_folder, write_text
from itt_composer.evaluation.held_out import load_routed_model
from itt_composer.export import export, standalone
from itt_composer.export.check import check_exported
from itt_composer.export.checkpoint import find_checkpoint
from itt_composer.model import ITTForCausalLM, thinking_layers
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


def test_without_the_package(trained, exported, tmp_path):
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
for family in ('loop', 'itt'):
    model = AutoModelForCausalLM.from_pretrained(f'{sys.argv[2]}/{family}', trust_remote_code=True)
    with torch.no_grad():
        results[family] = model(ids).logits, model.generate(ids, max_new_tokens=16, do_sample=False)
torch.save(results, sys.argv[4])
"""
    site_packages = str(Path(torch.__file__).parents[1])
    arguments = [site_packages, str(exported['itt'].parent), json.dumps(IDS.tolist()), str(tmp_path / 'logits.pt')]
    done = subprocess.run(
        [sys.executable, '-I', '-S', '-c', script, *arguments],
        env={**os.environ, 'HF_MODULES_CACHE': str(tmp_path / 'modules')},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for family, (logits, tokens) in torch.load(tmp_path / 'logits.pt').items():
        torch.testing.assert_close(logits, torch.tensor(trained[1][family][0]), atol=1e-5, rtol=0)
        model = AutoModelForCausalLM.from_pretrained(exported[family])
        assert torch.equal(tokens, model.generate(IDS, max_new_tokens=16, do_sample=False))
        assert tokens.shape[1] > IDS.shape[1]


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
    with pytest.raises(ValueError, match='not a whole Composer checkpoint') as error:
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
    assert '`selection: top_k`' in card and '`threshold`' in card
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
    with pytest.raises(ValueError, match='not a whole Composer checkpoint'):
        export(tmp_path / 'cut.pt', tmp_path / 'out')
    torch.save({'state': {'model': {}}}, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match='no model in it'):
        export(tmp_path / 'other.pt', tmp_path / 'out')

    whole = torch.load(checkpoint, weights_only=False)
    weights = whole['state']['model']
    name = 'model.model.layers.1.mlp.up_proj.weight'
    weights[name] = weights[name][:-1]
    torch.save(whole, tmp_path / 'shape.pt')
    with pytest.raises(ValueError, match=r'another shape of model: model.layers.1.mlp.up_proj.weight is \[47, 32\]'):
        export(tmp_path / 'shape.pt', tmp_path / 'out')
    del weights[name]
    whole['state']['integrations']['huggingface']['tokenizer'] = {}
    torch.save(whole, tmp_path / 'missing.pt')
    with pytest.raises(ValueError, match='no tokenizer in it; pass --tokenizer'):
        export(tmp_path / 'missing.pt', tmp_path / 'out')
    with pytest.raises(ValueError, match=r'up_proj.weight is its config has'):
        export(tmp_path / 'missing.pt', tmp_path / 'out', tokenizer=str(runs / 'tokenizer0'))
    with pytest.raises(ValueError, match=r'tokenizer .*nothing: '):
        export(checkpoint, tmp_path / 'out', tokenizer=str(tmp_path / 'nothing'))
    assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('.out*'))


def test_a_folder_that_is_read_must_hold_its_model(exported, tmp_path):
    """Transformers would fill what is missing with fresh weights, and every score of them would look like one."""
    for folder in exported.values():
        check_exported(folder)
    with pytest.raises(ValueError, match='no exported model in'):
        check_exported(tmp_path)
    (tmp_path / 'config.json').write_text((exported['itt'] / 'config.json').read_text())
    with pytest.raises(ValueError, match='a folder without weights'):
        check_exported(tmp_path)
    weights = load_file(exported['itt'] / 'model.safetensors')
    name = 'model.layers.1.mlp.up_proj.weight'
    save_file({**weights, name: weights[name][:-1].clone()}, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'another shape of model: .*up_proj.weight is \[47, 32\]'):
        check_exported(tmp_path)
    del weights[name]
    save_file(weights, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'up_proj.weight is its config has'):
        load_routed_model(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes((tmp_path / 'model.safetensors').read_bytes()[:2000])
    with pytest.raises(ValueError, match='not a whole file of weights'):
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


@pytest.mark.parametrize(
    ('second', 'message'),
    [
        ('def f(): pass', 'f is defined in other.a and in other.b'),
        ('from other import a\ndef g(f): return a.f(f)', r'line 2: f is also a name in this function'),
        ('from other import a\ndef g(): return a.missing()', 'missing is defined in no module'),
        ('import other.a', 'write "from other import'),
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
