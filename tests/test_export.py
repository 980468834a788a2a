"""Composer checkpoints as Hugging Face folders: with the package, without it, from shards, from foundry's callback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.exported_runs import FAMILIES, IDS, train
from common.ranks import run_on_ranks
from llmfoundry.utils.builders import build_composer_model
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, pipeline

from itt_composer.export.check import check_exported
from itt_composer.export.checkpoint import find_checkpoint
from itt_composer.export.folder import export
from itt_composer.model import ITTForCausalLM, thinking_layers

CALLBACK_FOLDER = 'huggingface/ba2'


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
    check_exported(exported[family])


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


def test_a_pipeline_and_what_the_tokenizer_gives_fit_the_model(exported):
    text = pipeline('text-generation', model=str(exported['itt']), trust_remote_code=True, device='cpu')
    assert text('A', max_new_tokens=2)[0]['generated_text']
    for family in FAMILIES:
        model, tokenizer = (cls.from_pretrained(exported[family]) for cls in (AutoModelForCausalLM, AutoTokenizer))
        assert model.generate(**tokenizer('A', return_tensors='pt'), max_new_tokens=1).shape[1] > 1


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
