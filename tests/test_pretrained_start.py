"""``model.pretrained`` and the examples of a fine-tuning in a training config: what is filled in, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from common.pretrained import SHAPE, write_pretrained, write_questions, write_tokenizer

from itt_composer.config.check import check_model
from itt_composer.config.examples import check_examples
from itt_composer.config.run_file import resolve, resolve_model, to_container
from itt_composer.training.preflight import Machine, problems
from itt_composer.training.resume import differences

CHAT = 'itt_composer.config.examples:chat'
PLAIN = 'itt_composer.config.examples:plain'
LLAMA = {'model_type': 'llama', **SHAPE}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp('gsm8k'))


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp('pretrained'))


@pytest.fixture
def given(pretrained, data, tmp_path):
    return [
        *('parts.machine=cpu', 'max_seq_len=160', f'variables.data={data}', f'variables.runs={tmp_path}'),
        f'model.pretrained={pretrained}',
    ]


def write_config(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize('name', ['gsm8k_dense', 'gsm8k_itt_x2', 'gsm8k_loop_x2'])
def test_the_shape_is_that_of_the_pretrained_model(name, given):
    config = resolve(f'sft/{name}', given)
    assert {key: config.model[key] for key in SHAPE} == SHAPE
    assert config.model.vocab_size == 257 and config.model.get('step_encoding_init', 0) == 0
    assert [loader.label for loader in config.eval_loader] == ['test']
    assert problems(config, Machine(1, 1, 0, 0)) == []
    check_model(to_container(config.model), name)  # as filled in, every key is one of the model's
    model, length = resolve_model(f'sft/{name}', given)
    assert (model['num_hidden_layers'], length) == (4, 160)


def test_of_a_hub_model_only_small_files_are_needed(given, pretrained, tmp_path, monkeypatch):
    cache = tmp_path / 'cache'
    cache.mkdir()

    def download(name, file):
        return shutil.copy(pretrained / file, cache / file)

    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    config = resolve('sft/gsm8k_itt_x2', [*given, 'model.pretrained=some/model'])
    assert config.model.hidden_size == SHAPE['hidden_size'] and problems(config, Machine(1, 1, 0, 0)) == []
    assert not list(cache.glob('*.safetensors'))


def test_an_itt_model_keeps_its_own_options(given, tmp_path):
    from itt_composer.model import ITTConfig

    own = ITTConfig(**SHAPE, thinking='itt', thinking_steps=1, alpha=0.5, max_position_embeddings=256)
    own.save_pretrained(tmp_path / 'itt')
    given += [f'model.pretrained={tmp_path / "itt"}', 'tokenizer.name=some/tokenizer']
    model = resolve('sft/gsm8k_itt_x2', given).model
    assert (model.alpha, model.thinking_layers, model.step_encoding_init) == (0.5, [0, 2], 0.1)
    with pytest.raises(ValueError, match=r'model.alpha: got 1.0, but .*/itt was trained with 0.5; leave it out'):
        resolve('sft/gsm8k_itt_x2', [*given, 'model.alpha=1.0'])


@pytest.mark.parametrize(
    ('overrides', 'words'),
    [
        ('model.pretrained=/nowhere', 'model.pretrained: no folder /nowhere; set a folder with a config.json'),
        ('model.pretrained={tmp}', 'model.pretrained: {tmp} has no config.json; set a folder that save_pretrained'),
        ('model.pretrained=no-such/model', 'model.pretrained: no folder no-such/model, and the hub has no such model'),
        ('model.pretrained=7', 'model.pretrained: expected a folder or a hub id, got 7'),
        (
            'model.pretrained={mamba}',
            "model.pretrained: {mamba}: the family 'mamba' is not supported; .*llama, mistral",
        ),
        ('model.pretrained={t5}', r'model.pretrained: {t5}: expected a decoder .*, got T5ForCondit.* \(t5\)'),
        ('model.pretrained={vocabulary}', 'vocab_size: expected a whole number .*, got .257'),
        ('model.pretrained={rope}', 'model.pretrained: .*{rope}: not loaded'),
        ('model.hidden_size=32', r'model.hidden_size: is that of model.pretrained \(.*\); leave it out'),
        ('model.thinking_layers=[4]', 'thinking_layers: no layer 4; the model has layers 0 to 3'),
        (
            'tokenizer.name={large}',
            'tokenizer.name: {large} has ids up to 259, but model.pretrained .* of 257',
        ),
        ('model.init_device=meta', 'model.init_device: meta makes a model without weights'),
        ('load_path=a.pt', 'load_path: its weights would replace those of model.pretrained'),
        ('max_seq_len=512', 'model.max_position_embeddings: expected at least max_seq_len .512., got 192'),
        ('train_loader.dataset.packing_ratio=2', 'packing_ratio: packing is not supported'),
        ('train_loader.dataset.packing_rato=2', "unknown key 'packing_rato'; did you mean 'packing_ratio'"),
        ('train_loader.dataset.max_seq_len=80', r'max_seq_len: expected max_seq_len \(160\), got 80'),
        ('train_loader.dataset.split=valid', "train_loader.dataset.split: expected one of train, test, got 'valid'"),
        ('train_loader.dataset.hf_name=openai/gsm8k', 'expected hf_name: json and hf_kwargs'),
        ('accumulate_train_batch_on_tokens=false', 'accumulate_train_batch_on_tokens: expected true'),
    ],
)
def test_what_cannot_be_the_start(overrides, words, given, tmp_path):
    named = {
        'tmp': tmp_path / 'empty',
        'mamba': write_config(tmp_path / 'mamba', model_type='mamba', architectures=['MambaForCausalLM']),
        't5': write_config(tmp_path / 't5', model_type='t5', architectures=['T5ForConditionalGeneration']),
        'large': tmp_path / 'large',
        'vocabulary': write_config(tmp_path / 'vocabulary', **LLAMA, vocab_size='257'),
        'rope': write_config(tmp_path / 'rope', **LLAMA, rope_scaling='linear'),
    }
    write_tokenizer(named['vocabulary'])
    named['tmp'].mkdir()
    write_tokenizer(named['large'], more=3)
    with pytest.raises(ValueError, match=words.format(**named)) as error:
        resolve('sft/gsm8k_itt_x2', [*given, overrides.format(**named)])
    assert '\n' not in str(error.value)


def test_refusals_come_before_the_long_imports(pretrained, tmp_path):
    write_tokenizer(tmp_path, more=3)
    code = """
import sys
from itt_composer.config.run_file import resolve
for start in sys.argv[1:]:
    try:
        resolve('sft/gsm8k_itt_x2', start.split())
    except ValueError as error:
        print(error)
print([name for name in ('torch', 'transformers', 'composer') if name in sys.modules])
"""
    start = f'model.pretrained={pretrained}'
    starts = ['model.pretrained=/nowhere', f'{start} model.thinking_layers=[7]', f'{start} tokenizer.name={tmp_path}']
    run = subprocess.run([sys.executable, '-c', code, *starts], capture_output=True, text=True, check=True)
    folder, layers, tokenizer, imported = run.stdout.splitlines()
    assert 'no folder /nowhere' in folder and 'no layer 7' in layers and 'has ids up to 259' in tokenizer
    assert imported == '[]'


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('{"question": "1?"}', "train.jsonl:3: no field 'answer', only 'question'"),
        ('{"question": "1?", "answer": " "}', "train.jsonl:3: answer: expected a text that is not empty, got ' '"),
        ('{"question": 1, "answer": "1"}', 'train.jsonl:3: question: expected a text that is not empty, got 1'),
        ('{"question": "1?", "answer"', r'train.jsonl:3: not JSON \(Expecting'),
        ('["1?", "1"]', 'train.jsonl:3: expected a JSON object, got list'),
        (b'{"question": "\xe9?", "answer": "1"}', "train.jsonl:3: 'utf-8' codec can't decode byte 0xe9"),
        (r'{"question": "1?", "answer": "\ud800"}', r"train.jsonl:3: 'utf-8' codec can't encode .*'\\ud800'"),
        (
            json.dumps({'question': '1?', 'answer': '1' * 200}) + '\n' + json.dumps({'question': '', 'answer': '1'}),
            'train.jsonl:4: question: expected a text',
        ),
        (
            '\n'.join(json.dumps({'question': '1?', 'answer': '1' * n}) for n in (150, 170)),
            r'train.jsonl:3: expected at most 160 tokens \(max_seq_len\) with the answer, got 172, and 1 more '
            'are too long; remove what is too long, or set max_seq_len=192',
        ),
    ],
)
def test_a_bad_line_is_named_before_the_start(line, words, given, tmp_path):
    folder = write_questions(tmp_path / 'data', train=2)
    with (folder / 'train.jsonl').open('ab') as file:
        file.write((line if isinstance(line, bytes) else line.encode()) + b'\n')
    (problem,) = problems(resolve('sft/gsm8k_dense', [*given, f'variables.data={folder}']), Machine(1, 1, 0, 0))
    assert re.search(words, problem) and '\n' not in problem


def test_the_file_and_the_format_of_the_examples(given, data, pretrained, tmp_path):
    (problem,) = problems(resolve('sft/gsm8k_dense', [*given, f'variables.data={tmp_path}']), Machine(1, 1, 0, 0))
    assert re.search(r'/train.jsonl: no such file; set variables.data', problem)
    file = data / 'train.jsonl'
    check_examples(file, {'prompt': 'question', 'response': 'answer'}, 160, pretrained)
    with pytest.raises(ValueError, match=r"train\.jsonl:1: no field 'answers'"):
        check_examples(file, {'prompt': 'question', 'response': 'answers'}, 160, pretrained)
    with pytest.raises(ValueError, match=r"expected module:function, got 'nowhere:f'"):
        check_examples(file, 'nowhere:f', 160, pretrained)
    with pytest.raises(ValueError, match='the tokenizer has no chat template; set the preprocessing_fn of plain'):
        check_examples(file, CHAT, 160, pretrained)
    tokenizer = write_tokenizer(tmp_path / 'chat')
    tokenizer.chat_template = '{% for message in messages %}{{ message.content }}{% endfor %}'
    tokenizer.save_pretrained(tmp_path / 'chat')
    longest = max(len(json.loads(line)['question']) + len(json.loads(line)['answer']) for line in file.open())
    longest += len('Question: \nAnswer:') + 1
    check_examples(file, CHAT, longest, tmp_path / 'chat')
    check_examples(file, PLAIN, longest + 1, pretrained)  # the blank before the answer
    for function, folder, tokens in ((CHAT, 'chat', longest - 1), (PLAIN, pretrained, longest)):
        with pytest.raises(ValueError, match=f'expected at most {tokens} tokens .* got {tokens + 1}'):
            check_examples(file, function, tokens, tmp_path / folder)


def test_lengths_are_those_of_the_text_whatever_the_tokenizer_was_saved_with(tmp_path):
    tokenizer, file = write_tokenizer(tmp_path), tmp_path / 'train.jsonl'
    file.write_text(json.dumps({'question': 'a' * 30, 'answer': 'b' * 30}) + '\n')
    tokenizer.pad_token = tokenizer.eos_token
    for used in ({'truncation': True, 'max_length': 32}, {'padding': 'max_length', 'max_length': 300}):
        tokenizer('a', **used)  # From now on a part of it.
        tokenizer.save_pretrained(tmp_path)
        check_examples(file, PLAIN, 80, tmp_path)
        with pytest.raises(ValueError, match=r'expected at most 79 tokens .* got 80'):
            check_examples(file, PLAIN, 79, tmp_path)


def test_another_pretrained_model_or_other_examples_are_another_training(given, pretrained, data, tmp_path):
    from itt_composer.config.pretrained import weights_sha256
    from itt_composer.training.manifest import recorded
    from itt_composer.training.resume import data_sha256

    def record(*overrides):
        config = resolve('sft/gsm8k_itt_x2', [*given, *overrides])
        config.variables.pretrained_weights = weights_sha256(config.model.pretrained)
        return config

    config = record()
    manifest = {'config': recorded(config), 'data_sha256': data_sha256(config)}
    assert differences(manifest, config) == {}
    copy = write_pretrained(tmp_path / 'copy')
    moved = write_questions(tmp_path / 'moved')
    assert differences(manifest, record(f'model.pretrained={copy}', f'variables.data={moved}')) == {}
    other = write_pretrained(tmp_path / 'other', seed=1)
    assert list(differences(manifest, record(f'model.pretrained={other}'))) == [
        'weights of model.pretrained', 'model.pretrained'
    ]  # fmt: skip
    more = write_questions(tmp_path / 'more', train=13)
    assert 'data fingerprint' in differences(manifest, record(f'variables.data={more}'))
