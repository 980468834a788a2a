"""Figure 2: easy and hard samples of AQuA, and the nuclear norm of a gradient computed directly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from common import small_models
from common.token_rows import ITT, byte_level_tokenizer, log_p_of_next
from transformers import GPT2Config, GPT2LMHeadModel

from research.figures import easy_and_hard
from research.figures.aqua import Sample, answers_correctly, read_samples


def gpt2(layers=2):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=layers, n_head=2, n_positions=256)).eval()


def test_nuclear_norm_is_that_of_a_gradient_computed_directly():
    model = small_models.build(**ITT, vocab_size=320)
    sample = Sample(prompt=[1, 5, 9, 4], options=[[i] for i in range(20, 25)], correct=2, solution=[7, 8, 30])
    for with_solution, predicted in ((False, 1), (True, 4)):
        norms = easy_and_hard.norms_of_sample(model, sample, with_solution)
        ids = torch.tensor([[1, 5, 9, 4, 22, 7, 8, 30]])
        log_p_S = log_p_of_next(model(ids).logits, ids)[0]
        loss = -log_p_S[3 : 3 + predicted].mean()
        (gradient,) = torch.autograd.grad(loss, [model.model.layers[1].self_attn.k_proj.weight])
        expected = torch.linalg.matrix_norm(gradient.double(), 'nuc').item()
        assert norms[1, 'k_proj'] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_answer_is_the_likeliest_letter():
    model = gpt2()
    sample = Sample(prompt=[1, 5, 9, 4], options=[[i] for i in range(20, 25)], correct=0, solution=[])
    best = int(model(torch.tensor([sample.prompt])).logits[0, -1, 20:25].argmax())
    for correct in range(5):
        sample.correct = correct
        assert answers_correctly(model, sample) is (correct == best)
    # Letters of two tokens: the sum of both.
    pair = Sample(prompt=[1, 5], options=[[20, i] for i in range(30, 35)], correct=0, solution=[])
    scores = [log_p_of_next(model(ids).logits, ids)[0, 1:].sum().item() for ids in
              (torch.tensor([pair.prompt + option]) for option in pair.options)]  # fmt: skip
    pair.correct = int(np.argmax(scores))
    assert answers_correctly(model, pair)


@pytest.fixture(scope='module')
def tokenizer():
    return byte_level_tokenizer()


def question(i):
    options = [f'{letter}){i * 10 + n}' for n, letter in enumerate('ABCDE')]
    return {'question': f'What is {i}?', 'options': options, 'rationale': f'it is {i}', 'correct': 'ABCDE'[i % 5]}


def write_questions(file, count):
    file.write_text(''.join(json.dumps(question(i)) + '\n' for i in range(count)))
    return file


def test_questions_become_samples(tmp_path, tokenizer):
    samples = read_samples(write_questions(tmp_path / 'q.jsonl', 7), 5, tokenizer, context=256)
    assert len(samples) == 5 and [sample.correct for sample in samples] == [0, 1, 2, 3, 4]
    text = tokenizer.decode(samples[3].tokens[0])
    assert text == 'Question: What is 3?\nOptions: A)30 B)31 C)32 D)33 E)34\nAnswer: D\nExplanation: it is 3'
    assert [tokenizer.decode(option) for option in samples[3].options] == [f' {letter}' for letter in 'ABCDE']
    letter, whole = samples[3].labels(False)[0], samples[3].labels(True)[0]
    assert tokenizer.decode(letter[letter >= 0]) == ' D'
    assert tokenizer.decode(whole[whole >= 0]) == ' D\nExplanation: it is 3'
    # A context that ends in the explanation cuts it; one that ends before drops the question.
    length = len(samples[0].prompt)
    cut = read_samples(tmp_path / 'q.jsonl', 1, tokenizer, context=length + 4)[0]
    assert cut.tokens.shape[1] <= length + 4 and cut.solution == samples[0].solution[: len(cut.solution)]
    assert read_samples(tmp_path / 'q.jsonl', 9, tokenizer, context=20) == []


def test_files_that_are_not_aqua_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r'aqua_dev.jsonl: no such file'):
        read_samples(tmp_path / 'aqua_dev.jsonl', 1, tokenizer, 256)
    (tmp_path / 'other.jsonl').write_text(json.dumps(question(0)) + '\n{"question": "?"}\n')
    with pytest.raises(ValueError, match=r'other.jsonl:2: not a question of AQuA \(KeyError'):
        read_samples(tmp_path / 'other.jsonl', 9, tokenizer, 256)


def test_easy_and_hard_table(tmp_path, tokenizer, monkeypatch, few_documents):
    write_questions(tmp_path / 'aqua_dev.jsonl', 6)
    write_questions(tmp_path / 'aqua_test.jsonl', 6)
    model = gpt2()
    before = [parameter.clone() for parameter in model.parameters()]
    right = iter([True, False, True, False, False, True])
    monkeypatch.setattr(easy_and_hard, 'answers_correctly', lambda model, sample: next(right))
    table = easy_and_hard.measure(model, tokenizer, tmp_path, train_samples=5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(table) == 2 * 2 * 2 * 4 and set(table['samples']) == {3}
    assert (
        (table['norm'] > 0).all() and (table['low'] <= table['norm']).all() and (table['norm'] <= table['high']).all()
    )
    # Untrained, so that the norms can be had from the model itself.
    right = iter([True, False, True, False, False, True])
    table = easy_and_hard.measure(model, tokenizer, tmp_path, train_samples=0)
    samples = read_samples(tmp_path / 'aqua_test.jsonl', 6, tokenizer, 256)
    norms = [easy_and_hard.norms_of_sample(model, samples[i], True)[1, 'v_proj'] for i in (0, 2, 5)]
    place = (table['target'] == 'letter and solution') & (table['group'] == 'easy') & (table['layer'] == 1)
    assert table[place & (table['projection'] == 'v_proj')]['norm'].item() == pytest.approx(np.mean(norms), rel=1e-5)
    easy_and_hard.plot(table).savefig(tmp_path / 'picture.png')
    monkeypatch.setattr(easy_and_hard, 'answers_correctly', lambda model, sample: False)
    with pytest.raises(ValueError, match='0 of 6 samples are easy'):
        easy_and_hard.measure(model, tokenizer, tmp_path, train_samples=0)


def test_training_on_the_samples_lowers_their_loss(tmp_path, tokenizer):
    samples = read_samples(write_questions(tmp_path / 'q.jsonl', 8), 8, tokenizer, 256)
    model = gpt2()

    def loss():
        with torch.no_grad():
            return np.mean([model(sample.tokens, labels=sample.labels(True)).loss.item() for sample in samples])

    before = loss()
    easy_and_hard.train(model, samples)
    assert loss() < before and not model.training
