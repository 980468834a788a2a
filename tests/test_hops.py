"""The hops task: answers that are right, a floor that is its entropy, and a document to a row."""

import collections
import json
import math

import numpy as np
import pytest
from streaming import LocalDataset
from transformers import AutoTokenizer

from data_prep import hops
from data_prep.conversion import convert
from itt_composer.study.study_file import YAMLS, load_study


def parse(text):
    """Pairs, walk and questions of a document, each a list."""
    pairs, walk, questions = (part.split() for part in text.split('.'))
    questions = [(int(k), x, y) for k, x, y in zip(*(questions[i::3] for i in range(3)), strict=True)]
    return list(zip(pairs[::2], pairs[1::2], strict=True)), walk, questions


@pytest.mark.parametrize('number', hops.DOMAINS.values())
def test_the_answers_follow_from_the_pairs(number):
    generator = np.random.default_rng(number)
    texts = {hops.document(number, generator) for _ in range(50)}
    assert len(texts) == 50
    for text in texts:
        assert len(text.split()) == hops.SEQ_LEN - 2 and set(text.split()) < set(hops.VOCABULARY)
        pairs, walk, questions = parse(text)
        f = dict(pairs)
        assert len(pairs) == len(f) == len(walk) == 8 and set(f) == set(f.values()) == set(hops.LETTERS)
        assert [f[x] for x in walk[:-1]] == walk[1:]
        assert len(questions) == 12
        for k, x, y in questions:
            for _ in range(k):
                x = f[x]
            assert k == number and x == y


def test_the_floor_is_the_entropy_of_the_documents(monkeypatch):
    """Counted, where there are few documents: 96 of two letters, two questions and three numbers of hops."""
    monkeypatch.setattr(hops, 'LETTERS', 'ab')
    monkeypatch.setattr(hops, 'QUESTIONS', 2)
    monkeypatch.setattr(hops, 'DOMAINS', {'x': 1, 'y': 2, 'z': 3})
    generator = np.random.default_rng(0)
    texts = [hops.document(number, generator) for number in (1, 2, 3) for _ in range(10_000)]
    shares = np.array(list(collections.Counter(texts).values())) / len(texts)
    assert len(shares) == 96
    # A counted entropy is too small by (96 - 1) / 2 / 30000 on average.
    assert -(shares * np.log(shares)).sum() == pytest.approx(hops.entropy(), abs=4e-3)


@pytest.mark.parametrize('number', [2, 4])
def test_the_shortcut_loss_is_that_of_a_model_that_only_looks_up(number):
    generator, losses = np.random.default_rng(5), []
    for _ in range(4000):
        _, walk, questions = parse(hops.document(number, generator))
        known = set(walk)
        for _, x, _ in questions:
            losses.append(0.0 if x in known else math.log(8 - len(set(walk))))
            known.add(x)
    per_document = np.reshape(losses, (-1, 12)).mean(1)
    assert per_document.mean() == pytest.approx(hops.shortcut_loss(), abs=4 * per_document.std() / math.sqrt(4000))


def test_a_row_is_a_document(tmp_path):
    hops.write_hops(tmp_path / 'text', 60, seed=3)
    source = tmp_path / 'text' / 'source'
    out = tmp_path / 'out'
    manifest = convert(source, out, str(tmp_path / 'text' / 'tokenizer'), hops.SEQ_LEN, 2000, workers=1)
    tokenizer = AutoTokenizer.from_pretrained(out / 'tokenizer')
    assert list(manifest['domains']) == list(hops.DOMAINS)
    for domain in hops.DOMAINS:
        texts = {json.loads(line)['text'] for line in (source / domain / 'documents.jsonl').open()}
        rows = [row['tokens'] for s in ('train', 'validation') for row in LocalDataset(str(out / s / domain))]
        assert len(rows) == len(texts) == 60
        assert {tokenizer.decode(row[1:-1]) for row in rows} == texts
        assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in rows)


def test_text_that_is_there_is_left_and_other_text_refused(tmp_path):
    hops.write_hops(tmp_path, 2, seed=3)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob('*') if path.is_file()}
    hops.write_hops(tmp_path, 2, seed=3)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(ValueError, match=r'OUT: .* holds the text of'):
        hops.write_hops(tmp_path, 3, seed=3)
    (tmp_path / 'hops.json').unlink()
    with pytest.raises(ValueError, match='left unfinished'):
        hops.write_hops(tmp_path, 2, seed=3)
    with pytest.raises(ValueError, match='DOCUMENTS: 0'):
        hops.write_hops(tmp_path / 'new', 0, seed=3)


def test_the_study_knows_the_task():
    study = load_study(YAMLS / 'studies' / 'hops_cpu.yaml')
    answers, predicted = study.report['answers'], hops.SEQ_LEN - 1
    assert answers['floor'] == pytest.approx(hops.entropy() / predicted, abs=1e-5)
    assert answers['share'] == pytest.approx(hops.QUESTIONS / predicted, abs=1e-5)
    assert all(settings['max_seq_len'] == hops.SEQ_LEN for settings in study.sets.values())
