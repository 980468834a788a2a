"""``itt eval --task gsm8k``: the answers are those of transformers' ``generate``, one question at a time."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from common.pretrained import questions, write_pretrained, write_questions
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from itt_composer.cli import app
from itt_composer.config.examples import plain
from itt_composer.model import ITTForCausalLM, thinking_layers

LAST_NUMBER = re.compile(r'-?[$0-9.,]{2,}|-?[0-9]+')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A dense model that answers in numbers, and an ITT made of it whose steps matter."""
    folder = tmp_path_factory.mktemp('models')
    dense = AutoModelForCausalLM.from_pretrained(write_pretrained(folder / 'dense'))
    tokenizer = AutoTokenizer.from_pretrained(folder / 'dense')
    digits = tokenizer.convert_tokens_to_ids(list('0123456789'))
    dense.lm_head.weight.data[digits] *= 4
    dense.config.max_position_embeddings = 96  # half of them for an answer
    itt = ITTForCausalLM.from_pretrained_dense(dense, thinking='itt', thinking_steps=1, step_encoding_init=0.5)
    for layer in thinking_layers(itt).values():
        layer.threshold_updates += 1
    write_questions(folder / 'gsm8k', test=3)
    (folder / 'gsm8k' / 'train.jsonl').unlink()
    for name, model in (('dense', dense), ('itt', itt)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def answers(folder, rows):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for row in rows:
        ids = tokenizer(plain(row)['prompt'], return_tensors='pt')['input_ids']
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=0)
        yield tokenizer.decode(out[0, ids.shape[1] :])


def test_scores_of_dense_and_itt_are_those_of_single_answers(models, tmp_path):
    rows = questions(4)
    numbers = {name: [LAST_NUMBER.findall(text) for text in answers(models / name, rows)] for name in ('dense', 'itt')}
    assert numbers['dense'] != numbers['itt'] and all(map(all, numbers.values()))
    right = [i % 3 != 0 for i in range(len(rows))]  # two of four, by the dense model's own answers
    for i, row in enumerate(rows):
        row['answer'] = f'#### {numbers["dense"][i][-1] if right[i] else 7}'
    (tmp_path / 'data' / 'gsm8k').mkdir(parents=True)
    lines = [json.dumps(row) + '\n' for row in rows]
    (tmp_path / 'data' / 'gsm8k' / 'test.jsonl').write_text(''.join(lines))
    command = ['eval', '--task', 'gsm8k', '--model', str(models / 'dense'), '--model', str(models / 'itt')]
    command += ['--eval-data', str(tmp_path / 'data'), '--out', str(tmp_path / 'out')]
    done = CliRunner().invoke(app, [*command, '--batch-tokens', '600'], env={'COLUMNS': '300'})
    assert done.exit_code == 0, done.output
    dense, itt = csv.DictReader((tmp_path / 'out' / 'gsm8k.csv').open())
    wanted = sum(itt_numbers[-1] == row['answer'][5:] for itt_numbers, row in zip(numbers['itt'], rows, strict=True))
    assert float(dense['flexible_extract']) == pytest.approx(2 / 4)
    assert float(dense['flexible_extract_stderr']) == pytest.approx((2 / 4 * 2 / 4 / 3) ** 0.5)
    assert float(itt['flexible_extract']) == pytest.approx(wanted / 4)
    assert dense['examples'] == itt['examples'] == '4'
    assert (dense['selection'], itt['selection'], itt['token_ratios']) == ('none', 'threshold', '0.9')
    assert '50.0 ± 28.9' in done.output


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--task', 'gsm'], "task: 'gsm' is not one of gsm8k"),
        (['--shots', '5'], 'shots: belongs to --task gsm8k; leave it out'),
        (['--task', 'gsm8k', '--row', 'llama_162m'], 'row: belongs to the ten tasks; leave it out'),
        (['--task', 'gsm8k', '--eval-data', '{tmp}'], '{tmp}/gsm8k/test.jsonl: no such file'),
        (
            ['--task', 'gsm8k', '--eval-data', '{models}', '--shots', '3'],
            'shots: expected at most 2, the number of other questions in {models}/gsm8k/test.jsonl, got 3',
        ),
        (['--task', 'gsm8k', '--token-ratios', '0.5'], 'is a dense baseline, which has no extra steps'),
    ],
)
def test_bad_input_is_one_line(options, words, models, tmp_path):
    named = {'tmp': tmp_path, 'models': models}
    given = [option.format(**named) for option in options]
    done = CliRunner().invoke(app, ['eval', '--model', str(models / 'dense'), *given])
    assert done.exit_code != 0
    assert words.format(**named) in str(done.exception or done.output) + done.output
