"""Long texts in segments give the tokens of the whole text."""

import json
import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.tokens import document_tokenizer
from data_prep.tokens.bpe_boundaries import MergeablePairs, pattern_boundary
from data_prep.tokens.document_tokenizer import DocumentTokenizer
from data_prep.tokens.tokenizer import load_saved

# The pattern that Llama 3's tokenizer splits a text by.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(document_tokenizer, 'SEGMENT_CHARACTERS', 400)
    monkeypatch.setattr(document_tokenizer, '_SEARCH_CHARACTERS', 390)


def texts():
    """Prose, code, one line without a newline, one without a space, and blank characters of all kinds."""
    generator = random.Random(0)
    words = ['the', 'of', "it's", 'x1', '漢字かな', 'é', '🙂', '...', 'Zürich', '12345', '', '<s>', '▁', '\x00']

    def text(ends, count):
        return ''.join(generator.choice(words) + generator.choice(ends) for _ in range(count))

    return {
        'prose': text([' ', ' ', ' ', '. ', '.\n', '\n\n', '\n'], 2000),
        'code': text([' ', ' ', ' ', '  ', '\n    ', '()\n', ';\n\n\t', '\r\n'], 2000),
        'one line': text([' ', '  ', ', '], 2000),
        'no blanks': text(['-', 'qz', '/'], 2000),
        'blanks': text(['\n\n\n', '     ', '\t \n', '\u00a0'], 2000),
    }


def test_llama_in_segments_is_sentencepiece_on_the_whole(shared, llama):
    from sentencepiece import SentencePieceProcessor

    oracle = SentencePieceProcessor(model_file=str(shared / 'data/llama_tokenizer/tokenizer.model'))
    tokenizer = DocumentTokenizer(llama)
    find_boundary = MergeablePairs.of(json.loads((llama / 'tokenizer.json').read_text())).boundary
    for kind, text in texts().items():
        cut = list(document_tokenizer.segments(text, find_boundary))
        assert ''.join(cut) == text
        assert len(text) // 400 < len(cut) < len(text) // 100, kind
        ids = [ids_N.tolist() for ids_N in tokenizer.ids(['short', text, '', text[:399]])]
        assert ids == oracle.encode(['short', text, '', text[:399]]), kind


def test_one_repeated_character_is_cut_and_decodes_to_itself(llama):
    text = 'a' * 5000
    (ids,) = DocumentTokenizer(llama).ids([text])
    whole = load_saved(llama)
    assert whole.decode(ids.tolist()) == text
    # The bound: what stands beside the thirteen boundaries.
    assert abs(len(ids) - len(whole.encode(text, add_special_tokens=False).ids)) <= 13


def byte_level(folder, pre_tokenizer):
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizer
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=['<s>', '</s>'])
    fast.train_from_iterator(texts().values(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token='<s>', eos_token='</s>').save_pretrained(folder)
    return folder


@pytest.mark.parametrize('pattern', ['gpt 2', 'gpt 2 with a space in front', 'llama 3'])
def test_patterns_split_at_the_seams(tmp_path, pattern):
    llama_3 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pre_tokenizer = {
        'gpt 2': pre_tokenizers.ByteLevel(add_prefix_space=False),
        'gpt 2 with a space in front': pre_tokenizers.ByteLevel(add_prefix_space=True),
        'llama 3': llama_3,
    }[pattern]
    folder = byte_level(tmp_path, pre_tokenizer)
    assert MergeablePairs.of(json.loads((folder / 'tokenizer.json').read_text())) is None
    for kind in ('prose', 'code', 'one line'):
        text = texts()[kind]
        cut = list(document_tokenizer.segments(text, pattern_boundary))
        assert ''.join(cut) == text
        assert len(cut) > len(text) // 400
        (ids,) = DocumentTokenizer(folder).ids([text])
        assert ids.tolist() == load_saved(folder).encode(text, add_special_tokens=False).ids, kind
