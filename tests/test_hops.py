"""The hops task: answers that are right, a floor that is its entropy, and a document to a row."""

import collections
import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from streaming import LocalDataset
from transformers import AutoTokenizer

from data_prep.conversion import convert
from itt_composer.model import ITTConfig, ITTForCausalLM
from research.k_hop import data
from research.k_hop.answers import main, measure
from research.study.report import answers
from research.study.results import COLUMNS, write_table
from research.study.study_file import YAMLS, load_study

TINY = dict(
    vocab_size=len(data.VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    max_position_embeddings=64, initializer_range=0.3, router_initializer_range=0.5,
)  # fmt: skip


def parse(text):
    """Pairs, walk and questions of a document, each a list."""
    pairs, walk, questions = (part.split() for part in text.split('.'))
    questions = [(int(k), x, y) for k, x, y in zip(*(questions[i::3] for i in range(3)), strict=True)]
    return list(zip(pairs[::2], pairs[1::2], strict=True)), walk, questions


@pytest.mark.parametrize('number', data.DOMAINS.values())
def test_the_answers_follow_from_the_pairs(number):
    generator = np.random.default_rng(number)
    texts = {data.document(number, generator) for _ in range(50)}
    assert len(texts) == 50
    for text in texts:
        assert len(text.split()) == data.SEQ_LEN - 2 and set(text.split()) < set(data.VOCABULARY)
        pairs, walk, questions = parse(text)
        f = dict(pairs)
        assert len(pairs) == len(f) == len(walk) == 8 and set(f) == set(f.values()) == set(data.LETTERS)
        assert [f[x] for x in walk[:-1]] == walk[1:]
        assert len(questions) == 12
        for k, x, y in questions:
            for _ in range(k):
                x = f[x]
            assert k == number and x == y


def test_the_lowest_losses_are_the_entropy_of_the_documents(monkeypatch):
    """Counted, where there are few documents: 96 of two letters, two questions and three numbers of hops."""
    monkeypatch.setattr(data, 'LETTERS', 'ab')
    monkeypatch.setattr(data, 'QUESTIONS', 2)
    monkeypatch.setattr(data, 'DOMAINS', {'x': 1, 'y': 2, 'z': 3})
    generator = np.random.default_rng(0)
    texts = [data.document(number, generator) for number in (1, 2, 3) for _ in range(4000)]
    shares = np.array(list(collections.Counter(texts).values())) / len(texts)
    assert len(shares) == 96
    lowest = sum(data.lowest_losses()[kind] * len(places) for kind, places in data.positions().items())
    walk_starts = math.log(2)
    # A counted entropy is too small by (96 - 1) / 2 / 12000 on average.
    assert -(shares * np.log(shares)).sum() == pytest.approx(lowest + walk_starts, abs=8e-3)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    """Shards of 60 documents for each number of hops, and the folder of their text."""
    folder = tmp_path_factory.mktemp('hops')
    data.write_hops(folder / 'text', 60, seed=3)
    tokenizer = str(folder / 'text' / 'tokenizer')
    convert(folder / 'text' / 'source', folder / 'data', tokenizer, data.SEQ_LEN, 5000, workers=1)
    return folder / 'data', folder / 'text'


def test_a_sequence_is_a_document(shards):
    out, text = shards
    tokenizer = AutoTokenizer.from_pretrained(out / 'tokenizer')
    for domain in data.DOMAINS:
        texts = {json.loads(line)['text'] for line in (text / 'source' / domain / 'documents.jsonl').open()}
        rows = [row['tokens'] for s in ('train', 'validation') for row in LocalDataset(str(out / s / domain))]
        assert len(rows) == len(texts) == 60
        assert {tokenizer.decode(row[1:-1]) for row in rows} == texts
        assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in rows)


def test_what_each_kind_of_token_costs(shards):
    """Each token's kind from the text, and its loss from the probabilities of the prefix that ends before it."""
    torch.manual_seed(0)
    model = ITTForCausalLM(ITTConfig(**TINY, thinking='itt', token_ratios=[0.5, 0.5])).eval()
    table = measure(model, shards[0], sequences=1).set_index(['selection', 'hops', 'kind']).loss
    tokenizer = AutoTokenizer.from_pretrained(shards[0] / 'tokenizer')
    expected = collections.defaultdict(list)
    model.set_thinking(selection='threshold')
    for domain, number in data.DOMAINS.items():
        for row in itertools.islice(LocalDataset(str(shards[0] / 'validation' / domain)), 1):
            ids = torch.tensor(row['tokens'].astype(np.int64))
            pairs, walk, questions = parse(tokenizer.decode(ids[1:-1]))
            kinds = ['', *['pairs'] * 16, '', '', *['walk'] * 7, '', 'number of hops']
            kinds += ['letters asked', 'answers', '', *['letters asked', 'answers', ''] * 11]
            assert len(pairs) == 8 and len(walk) == 8 and len(questions) == 12 and len(kinds) == data.SEQ_LEN
            for i, kind in enumerate(kinds):
                if kind:
                    with torch.no_grad():
                        loss = -model(ids[None, :i]).logits[0, -1].log_softmax(0)[ids[i]]
                    expected[number, kind].append(loss.item())
    assert len(table.threshold) == len(expected) == 20 and len(table['top_k']) == 20
    for key, losses in expected.items():
        assert table.threshold[key] == pytest.approx(np.mean(losses), rel=1e-5), key
    assert (table.threshold - table['top_k']).abs().max() > 1e-4
    plain = measure(ITTForCausalLM(ITTConfig(**TINY)).eval(), shards[0], sequences=1)
    assert set(plain.selection) == {'threshold'}


def test_what_was_measured_before_is_kept(shards, tmp_path, capsys):
    """Of a run whose checkpoints are elsewhere, too; one that has neither is named and left out."""
    rows = [dict.fromkeys(COLUMNS, 1) | {'run': run, 'variant': run, 'stage': 'main'} for run in ('a', 'b')]
    write_table(pd.DataFrame(rows), tmp_path / 'results.csv')
    known = 'run,variant,seed,hops,selection,kind,loss\na,a,1,1,threshold,walk,0.5\n'
    (tmp_path / 'answers.csv').write_text(known)
    main(tmp_path, shards[0], sequences=2)
    assert (tmp_path / 'answers.csv').read_text() == known
    assert 'b: left out' in capsys.readouterr().out


def test_other_data_is_refused(shards, tmp_path):
    shutil.copytree(shards[0], tmp_path / 'data')
    shutil.rmtree(tmp_path / 'data' / 'validation' / 'hops_3')
    with pytest.raises(ValueError, match='not the text of the k-hop task'):
        measure(ITTForCausalLM(ITTConfig(**TINY)), tmp_path / 'data', sequences=2)


def test_text_that_is_there_is_left_and_other_text_refused(tmp_path):
    data.write_hops(tmp_path, 2, seed=3)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob('*') if path.is_file()}
    data.write_hops(tmp_path, 2, seed=3)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(ValueError, match=r'--out: .* holds the text of'):
        data.write_hops(tmp_path, 3, seed=3)
    (tmp_path / 'hops.json').unlink()
    with pytest.raises(ValueError, match='unfinished text'):
        data.write_hops(tmp_path, 2, seed=3)
    with pytest.raises(ValueError, match='--documents: expected 1 or more, got 0'):
        data.write_hops(tmp_path / 'new', 0, seed=3)


def test_the_report_has_what_the_kinds_cost(tmp_path):
    study = load_study(YAMLS / 'studies' / 'k_hop.yaml')
    assert all(settings['max_seq_len'] == data.SEQ_LEN for settings in study.sets.values())
    rows = [
        {
            'run': f'llama-s{seed}',
            'variant': 'llama',
            'seed': seed,
            'hops': n,
            'selection': 'threshold',
            'kind': kind,
            'loss': n + seed,
        }
        for seed in (18, 17)
        for n in data.DOMAINS.values()
        for kind in data.positions()
    ]
    pages = '\n'.join(answers(pd.DataFrame(rows)))
    assert '| llama | threshold | 18.000, 19.000 | 19.000, 20.000 | 20.000, 21.000 | 21.000, 22.000 | 20.000 |' in pages
    assert 'The lowest possible mean of a left-to-right model is 1.386' in pages and '### Number of hops' in pages
