"""Word by word, with a store of word_cache, the tokens are those of the whole text."""

import json
import random
import re

import pytest

from data_prep.tokens import word_cache
from data_prep.tokens.bpe_boundaries import MergeablePairs
from data_prep.tokens.document_tokenizer import DocumentTokenizer
from data_prep.tokens.tokenizer import load_saved

HOSTILE = [
    '',
    ' ',
    '  ',
    '\n',
    '\n\n\n',
    ' \n \n  ',
    '\r\n\r\n',
    '   leading',
    'trailing   ',
    'runs  of   spaces     and\t\ttabs \t mixed',
    ' \n\n    indented:\n\n\n\treturn x ',
    '</s>',
    '<s> a </s> b<unk></s>\n</s>',
    '<0x0A><0x00> <0x0A>\n',
    '▁', ' ▁ ▁▁a▁b ▁', '▁\n▁',
    'nul \0\0 and \x01\x1f\x7f\x85\u2028\u2029 controls \v\f\x1c',
    'byte fallback: \U0001f9ff\ue000\u0b95\ufdfd \ufeff',
    '🙂🏳️\u200d🌈🙂 🙂  🙂\n🙂 a🙂b',
    'ﬁ e\u0301 é \u00a0\u3000\u200b wide',
    '漢字かなと 한국어 العربية ไทย हिन्दी',
    "don't “quote” l’été «mot» x²+y₁=1,234.5e-6",
    'x' * 3000 + ' ' + 'y' * 100 + '!' * 500 + ' ' * 700 + 'z',
    'MixedCASE_and-punct.uation/path\\to{[(<>)]}: 2019-2020 v1.2.3',
]  # fmt: skip


@pytest.fixture(scope='module')
def oracle(shared):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(shared / 'data/llama_tokenizer/tokenizer.model'))


def random_texts(characters, count, seed=0):
    """Strings of a few of the characters each, so that the same neighbours and words come again, and of all of them."""
    generator = random.Random(seed)
    for i in range(count):
        few = generator.choices(characters, k=generator.choice([3, 8, 200])) + [' ', ' ', '\n', '▁', '🙂'][: i % 6]
        yield ''.join(generator.choices(few, k=generator.choice([1, 5, 60, 400])))


def tokens(tokenizer, texts):
    return [ids_N.tolist() for ids_N in tokenizer.ids(texts)]


def test_hostile_and_random_texts_are_sentencepiece_s(llama, oracle):
    tokenizer = DocumentTokenizer(llama)
    assert tokenizer._words is not None
    pieces = [oracle.id_to_piece(i) for i in range(259, oracle.get_piece_size())]
    characters = sorted({character for piece in pieces for character in piece})
    texts = [*HOSTILE, *random_texts(characters, 150), *random_texts(pieces, 50), *random_texts(HOSTILE[4:], 25)]
    assert tokens(tokenizer, texts) == oracle.encode(texts)
    assert tokens(tokenizer, texts[::-1]) == oracle.encode(texts[::-1])  # from the store


def test_the_store_is_bounded_and_forgets_nothing_that_matters(llama, monkeypatch):
    monkeypatch.setattr(word_cache, '_WORDS', 30)
    monkeypatch.setattr(word_cache, '_LONGEST_WORD', 12)
    tokenizer, whole = DocumentTokenizer(llama), load_saved(llama)
    generator = random.Random(0)
    for _ in range(200):
        text = ' '.join(generator.choices(['the', 'of', 'a' * 13, '\n', *map(str, range(300))], k=20))
        assert tokens(tokenizer, [text]) == [whole.encode(text, add_special_tokens=False).ids]
        kept = [*tokenizer._words._recent, *tokenizer._words._before]
        assert len(kept) <= 2 * (30 + 20)
        assert all(len(word) <= 12 for word in kept)
        assert ' the' in kept or ' the' not in text


@pytest.fixture(scope='module')
def small(llama, tmp_path_factory):
    """LLaMA's tokenizer with the tokens of its first merges and the single characters alone."""
    saved = json.loads((llama / 'tokenizer.json').read_text())
    model = saved['model']
    pieces = [piece for piece, i in model['vocab'].items() if i < 2000 or len(piece) == 1]
    model['vocab'] = {piece: i for i, piece in enumerate(pieces)}
    pairs = [pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges']]
    model['merges'] = [pair for pair in pairs if ''.join(pair) in model['vocab'] and {*pair} <= model['vocab'].keys()]
    folder = tmp_path_factory.mktemp('small')
    (folder / 'tokenizer.json').write_text(json.dumps(saved))
    return folder


def changed(llama, folder, rules=(), added=(), **model):
    """A tokenizer with merge rules before all others, added tokens that are not special, or model settings."""
    saved = json.loads((llama / 'tokenizer.json').read_text())
    vocabulary = saved['model']['vocab']
    for left, right in rules:
        for piece in (left, right, left + right):
            vocabulary.setdefault(piece, len(vocabulary))
    saved['model']['merges'] = [*map(list, rules), *saved['model']['merges']]
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'special'), False)
    for content in added:
        saved['added_tokens'].append({'id': len(vocabulary) + 9, 'content': content, 'normalized': True, **flags})
    saved['model'] |= model
    folder.mkdir(exist_ok=True)
    (folder / 'tokenizer.json').write_text(json.dumps(saved))
    return folder


@pytest.mark.parametrize(
    ('change', 'by_word'),
    [
        ({}, True),
        ({'rules': [('e', ',')]}, True),  # letters and others are one kind then
        ({'rules': [('(', 'x'), ('(x', ')')]}, True),
        ({'rules': [('e', '▁')]}, False),
        ({'rules': [(',', '▁'), (',▁', 'a')]}, False),
        ({'rules': [('e', '\n')]}, False),
        ({'rules': [('\n', '\n')]}, False),
        ({'rules': [('<0xF0>', '<0x9F>')]}, False),
        ({'added': ['the b']}, False),
        ({'ignore_merges': True}, False),
    ],
)
def test_only_cuts_that_the_merges_allow(small, tmp_path, change, by_word):
    folder = changed(small, tmp_path / 'tokenizer', **change)
    # Without its split before newlines, which not every LLaMA tokenizer has and which would hide a merge.
    saved = json.loads((folder / 'tokenizer.json').read_text())
    (folder / 'tokenizer.json').write_text(json.dumps(saved | {'pre_tokenizer': None}))
    tokenizer, whole, plain = DocumentTokenizer(folder), load_saved(folder), load_saved(small)
    texts = ['the book, the boat (x) (x y) e\ne \n\n🙂 e , a, a,a e,e', *random_texts('ex,() \nab🙂', 200)]
    expected = [whole.encode(text, add_special_tokens=False).ids for text in texts]
    assert (tokenizer._words is not None) == by_word
    assert tokens(tokenizer, texts) == expected
    if change.keys() - {'ignore_merges'}:  # the change does something to these texts
        assert expected[0] != plain.encode(texts[0], add_special_tokens=False).ids


def test_metaspace_in_front_only_where_none_is(small, tmp_path):
    """The newer form of LLaMA's tokenizers, which puts no second space before a text that begins with one."""
    folder = changed(small, tmp_path / 'tokenizer')
    saved = json.loads((folder / 'tokenizer.json').read_text())
    metaspace = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False}
    (folder / 'tokenizer.json').write_text(json.dumps(saved | {'normalizer': None, 'pre_tokenizer': metaspace}))
    tokenizer, whole = DocumentTokenizer(folder), load_saved(folder)
    assert tokenizer._words is not None
    assert tokens(tokenizer, HOSTILE) == [whole.encode(text, add_special_tokens=False).ids for text in HOSTILE]


def test_words_are_the_whole_text():
    pairs = MergeablePairs({('▁', 'a'), ('a', 'b'), ('▁', '▁'), ('.', ','), ('é', 'a')}, {' ': '▁'})
    pattern = pairs.words()
    assert pattern.findall('  ab  .,\n\n12 cé.a▁a 漢字  ') == [
        '  ab', '  .,', '\n', '\n', '12', ' c', 'é', '.', 'a', '▁a', ' ', '漢', '字', '  ',
    ]  # fmt: skip
    assert all(''.join(pattern.findall(text)) == text for text in HOSTILE)
    assert isinstance(pattern, re.Pattern)
