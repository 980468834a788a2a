"""``itt sweep``: perplexity against FLOPs under both rules."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from common import pretrained, shards, small_models

from itt_composer.evaluation import sweep
from itt_composer.evaluation.held_out import held_out_rows
from itt_composer.flops import Decoder, exact_flops, paper_flops
from itt_composer.model import ITTForCausalLM
from itt_composer.paper.tables import paper_tables
from itt_composer.ratios import ratios_key


def test_settings_are_those_of_the_table():
    rows = paper_tables()['table2_and_4']['rows']
    paper = {tuple(row[1]) for row in rows if row[0].startswith('itt')}
    settings = sweep.settings_for(3, [0.7, 0.7, 0.7], [])
    assert {tuple(setting) for setting in settings} == paper | {(0, 0, 0)}


def test_table_and_picture(tmp_path):
    data = shards.write_data(tmp_path / 'data', {}, {'a': 8, 'b': 4}, row_length=32)
    model = small_models.build(thinking='itt', token_ratios=[0.7, 0.7, 0.7])
    model.save_pretrained(tmp_path / 'model')
    sweep.main(tmp_path / 'model', data, ratios=['0.1/0.2/0.3'], sequences=12, batch_size=5, out=tmp_path / 'out/table')
    with open(tmp_path / 'out/table.csv') as file:
        rows = {row['ratios']: {k: float(v) for k, v in row.items() if k != 'ratios'} for row in csv.DictReader(file)}
    assert set(rows) == {ratios_key(setting) for setting in sweep.settings_for(3, [0.7] * 3, ['0.1/0.2/0.3'])}
    assert (tmp_path / 'out/table.png').read_bytes().startswith(b'\x89PNG')

    decoder = Decoder.from_model_config(model.config.to_dict())
    for key, row in rows.items():
        ratios = [float(part) for part in key.split('/')]
        assert row['paper_gflops'] == pytest.approx(paper_flops(decoder, 32, ratios) / 1e9)
        assert row['exact_gflops'] == pytest.approx(exact_flops(decoder, 32, ratios).total / 1e9)
        assert row['causal_gap'] == row['perplexity_threshold'] - row['perplexity_top_k']
        assert row['share_error'] < 0.25
    # Without steps there is nothing to route, so both rules give one perplexity; with them they do not.
    assert rows['0/0/0']['causal_gap'] == 0
    assert all(row['causal_gap'] != 0 for key, row in rows.items() if key != '0/0/0')

    # One cell from scratch.
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    ids = held_out_rows(data, 12, model.config)[order][6:]
    model.set_thinking([0.5, 0.7, 0.5], selection='top_k')
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert rows['0.5/0.7/0.5']['perplexity_top_k'] == pytest.approx(math.exp(loss.item()), rel=1e-5)


def test_other_numbers_of_steps_and_bad_input(tmp_path):
    assert sweep.settings_for(1, [0.9], ['0.25']) == [[0], [0.9], [0.7], [0.5], [0.3], [0.25]]
    data = shards.write_data(tmp_path / 'data', {}, {'a': 4}, row_length=16)
    small_models.build(thinking='itt').save_pretrained(tmp_path / 'model')
    for arguments, message in (
        (dict(ratios=['0.5']), 'sweep: token_ratios: 1 ratios for 3 extra steps'),
        (dict(sequences=9), r'sequences: expected at most 4, .*, got 9'),
    ):
        with pytest.raises(SystemExit, match=message):
            sweep.main(tmp_path / 'model', data, **arguments)


def test_test_examples_give_the_perplexity_of_the_answers(tmp_path):
    folder = pretrained.write_pretrained(tmp_path / 'dense')
    model = ITTForCausalLM.from_pretrained_dense(folder, thinking='itt', thinking_steps=1, step_encoding_init=0.5)
    model.save_pretrained(tmp_path / 'itt')
    pretrained.write_tokenizer(tmp_path / 'itt')
    file = pretrained.write_questions(tmp_path / 'data', test=7) / 'test.jsonl'
    sweep.main(tmp_path / 'itt', file.parent, sequences=7, out=tmp_path / 'sweep')
    with open(tmp_path / 'sweep.csv') as table:
        rows = {row['ratios']: row for row in csv.DictReader(table)}
    # Without extra steps the model is the dense one; three examples are evaluated.
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(''.join(lines[i] for i in order[4:]))
    expected = math.exp(pretrained.answer_loss(folder, file))
    assert float(rows['0']['perplexity_threshold']) == pytest.approx(expected, rel=1e-5)
    assert abs(float(rows['0.5']['perplexity_threshold']) - expected) > 0.01 and float(rows['0.5']['share_error']) < 0.2
    with pytest.raises(SystemExit, match=r'sequences: expected at most 3, the number in .*test.jsonl, got 5'):
        sweep.main(tmp_path / 'itt', file.parent, sequences=5, out=tmp_path / 'sweep')
    file.write_text('{"question": "1 + 1?"}\n')
    with pytest.raises(SystemExit, match=r"test.jsonl:1: no field 'answer'"):
        sweep.main(tmp_path / 'itt', file.parent, out=tmp_path / 'sweep')
