"""Tokenizers: LLaMA's against sentencepiece itself, the trained one, and those that cannot be used."""

import itertools
import json
import random
import re

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2TokenizerFast

from data_prep.tokens.document_tokenizer import DocumentTokenizer
from data_prep.tokens.tokenizer import TokenizerRequest, from_sentencepiece, load_saved, save_tokenizer

ODD_TEXTS = [
    '',
    ' ',
    '\n',
    ' a',
    'a  b   c  ',
    '\n\n \n\t\n x',
    '<s>',
    'x</s>y <unk> <0x0A>',
    'nul \0 end',
    '▁low▁line ▁',
    '漢字かな 🙂🏳️‍🌈 \u202e \ufeff',
    '\r\n' * 5,
    'word ' * 3000,
]


def sample_texts(sample):
    """Some ten thousand characters of some documents of each domain."""
    for path in sorted(sample.glob('*/*.jsonl')):
        with open(path, encoding='utf-8') as lines:
            for _, line in zip(range(8), lines, strict=False):
                yield json.loads(line)['text'][:10_000]


def test_llama_gives_the_ids_of_sentencepiece(shared, llama):
    llama_tokenizer = shared / 'data/llama_tokenizer'
    oracle = SentencePieceProcessor(model_file=str(llama_tokenizer / 'tokenizer.model'))
    ours, by_word, hugging_face = load_saved(llama), DocumentTokenizer(llama), AutoTokenizer.from_pretrained(llama)
    assert ours.get_vocab_size() == 32000
    # Or else it is converted again.
    assert hugging_face.backend_tokenizer.pre_tokenizer is not None
    texts = list(sample_texts(shared / 'data/redpajama_sample'))
    assert len(texts) > 40
    for text in texts + ODD_TEXTS:
        expected = oracle.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == expected, text[:50]
        assert [ids_N.tolist() for ids_N in by_word.ids([text])] == [expected], text[:50]
    for text in texts[::7]:
        assert hugging_face(text)['input_ids'] == [1, *oracle.encode(text)]
    assert hugging_face.bos_token_id == 1
    assert hugging_face.eos_token_id == 2


def test_llama_file_and_folder_are_the_same_tokenizer(shared):
    llama_tokenizer = shared / 'data/llama_tokenizer'
    file, folder = (TokenizerRequest.of(str(p)) for p in (llama_tokenizer / 'tokenizer.model', llama_tokenizer))
    assert file.sha256 == folder.sha256


def test_training_is_deterministic_and_lossless(tmp_path):
    corpus = [f'{a} the {b} of {a}{b}\n' for a in ('cat', 'dog', 'é漢') for b in ('house', 'garden', 'road')] * 5
    saved = [save_tokenizer(None, corpus, tmp_path / name) for name in 'abc']
    assert saved[0] == saved[1] == saved[2]
    assert (saved[0]['bos_token_id'], saved[0]['eos_token_id']) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'a')
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ['<unk>', '<s>', '</s>']
    save_tokenizer(str(tmp_path / 'a'), [], tmp_path / 'again')
    rust, again = load_saved(tmp_path / 'a'), load_saved(tmp_path / 'again')
    for text in corpus[:9] + ODD_TEXTS:
        ids = rust.encode(text, add_special_tokens=False).ids
        assert not {0, 1, 2} & set(ids)
        assert rust.decode(ids) == text
        assert again.encode(text, add_special_tokens=False).ids == ids


def test_the_size_of_a_trained_tokenizer_can_be_set(tmp_path):
    words = (''.join(letters) for letters in itertools.product('abcdefgh', repeat=4))
    corpus = [' '.join(words)] * 3
    assert save_tokenizer('bpe:300', corpus, tmp_path / 'a')['vocab_size'] == 300
    assert TokenizerRequest.of('bpe:4096') == TokenizerRequest.of(None) != TokenizerRequest.of('bpe:300')
    for name in ('bpe:', 'bpe:many', 'bpe:258'):
        with pytest.raises(ValueError, match=f'--tokenizer: {name}: expected bpe: and a number of tokens from 259 on'):
            TokenizerRequest.of(name)


def word_tokenizer(folder, size, holes=(), **special):
    vocabulary = {f'w{n}': n for n in range(size) if n not in holes}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token='w0'))
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(('size', 'dtype'), [(65536, 'uint16'), (65537, 'uint32')])
def test_ids_are_stored_in_the_smallest_type_that_holds_them(tmp_path, size, dtype):
    words = word_tokenizer(tmp_path / 'words', size, holes=range(3, 9), bos_token='w1', eos_token='w2')
    saved = save_tokenizer(words, [], tmp_path / 'out')
    # A vocabulary with holes is as large as its largest id.
    assert (saved['vocab_size'], saved['token_dtype']) == (size, dtype)
    (ids_N,) = DocumentTokenizer(tmp_path / 'out').ids([f'w{size - 1}'])
    assert (ids_N.dtype, ids_N.tolist()) == (dtype, [size - 1])


END = '<|endoftext|>'


@pytest.mark.parametrize(
    'special',
    [
        {'unk_token': END, 'bos_token': END, 'eos_token': END},  # GPT-2's own
        {'bos_token': END, 'eos_token': END, 'pad_token': END},
        {'bos_token': END, 'eos_token': 'w1', 'pad_token': 'w1', 'unk_token': 'w0'},
        {'bos_token': END, 'eos_token': 'w1', 'pad_token': 'w1', 'unk_token': 'w9'},
    ],
)
@pytest.mark.parametrize('cls', [PreTrainedTokenizerFast, Qwen2TokenizerFast])
def test_no_token_of_a_sequence_is_padding(tmp_path, special, cls):
    """The loss leaves out what equals the padding token: BOS, EOS and what documents hold must not."""
    fast = Tokenizer(models.WordLevel({f'w{n}': n for n in range(9)} | {END: 9}, unk_token='w0'))
    cls(tokenizer_object=fast, **special).save_pretrained(tmp_path / 'given')
    saved = save_tokenizer(str(tmp_path / 'given'), [], tmp_path / 'out')
    loaded = AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert loaded.eos_token == special['eos_token']
    assert loaded.pad_token_id not in {0, saved['bos_token_id'], saved['eos_token_id']}


def test_a_padding_token_of_its_own_stays(tmp_path, llama):
    given = word_tokenizer(tmp_path / 'given', 10, bos_token='w1', eos_token='w2', pad_token='w3')
    save_tokenizer(given, [], tmp_path / 'out')
    assert AutoTokenizer.from_pretrained(tmp_path / 'out').pad_token == 'w3'
    assert AutoTokenizer.from_pretrained(llama).pad_token == '<unk>'


def sentencepiece_model(folder, **options):
    """Of a LLaMA-like kind: byte fallback, digits apart, nothing normalised."""
    import sentencepiece

    draw = random.Random(0)
    words = ['harbour', 'lantern', 'copper', 'meadow', 'violet', 'engine', 'ladder', 'winter']
    settings = dict(vocab_size=450, model_type='bpe', byte_fallback=True, split_digits=True, hard_vocab_limit=False)
    settings |= dict(normalization_rule_name='identity', remove_extra_whitespaces=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(' '.join(draw.choices(words, k=20)) + f' {n}.' for n in range(500)),
        model_prefix=str(folder / 'm'),
        allow_whitespace_only_pieces=True,
        **settings | options,
    )
    return folder / 'm.model'


def test_special_ids_are_the_sentencepiece_models_own(tmp_path):
    options = dict(bos_id=5, eos_id=3, unk_id=1, pad_id=0, bos_piece='[B]', eos_piece='[E]', unk_piece='[U]')
    model = sentencepiece_model(tmp_path, **options, pad_piece='[P]')
    oracle = SentencePieceProcessor(model_file=str(model))
    saved = save_tokenizer(str(model), [], tmp_path / 'out')
    assert (saved['bos_token_id'], saved['eos_token_id']) == (5, 3)
    assert saved['vocab_size'] == oracle.get_piece_size()
    loaded = AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert (loaded.unk_token_id, loaded.pad_token_id) == (1, 0)
    texts = ['a copper lantern', '[B] 12 [E]', 'é\n\nx', ' wintermeadow ']
    assert [ids_N.tolist() for ids_N in DocumentTokenizer(tmp_path / 'out').ids(texts)] == oracle.encode(texts)


@pytest.mark.parametrize('symbols', [['<|sep|>'], ['meadow', '<|x|>'], ['zz']])
def test_user_defined_symbols_give_sentencepieces_ids_or_are_refused(tmp_path, symbols):
    model = sentencepiece_model(tmp_path, user_defined_symbols=symbols)
    oracle = SentencePieceProcessor(model_file=str(model))
    try:
        save_tokenizer(str(model), [], tmp_path / 'out')
    except ValueError as error:
        assert re.search(r'--tokenizer: .*m\.model is not a model like LLaMA', str(error))
        return
    texts = [
        f(symbol) for symbol in symbols for f in (str, 'copper{}lantern'.format, 'a {} b'.format, '{0}{0}a'.format)
    ]
    assert [ids_N.tolist() for ids_N in DocumentTokenizer(tmp_path / 'out').ids(texts)] == oracle.encode(texts)


def test_a_sentencepiece_model_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'm\.model is .*: expected BOS, EOS and UNK tokens, got bos'):
        save_tokenizer(str(sentencepiece_model(tmp_path, eos_id=-1)), [], tmp_path / 'out')


def test_a_tokenizer_json_is_taken_with_what_stands_beside_it(tmp_path):
    folder = tmp_path / 'words'
    word_tokenizer(folder, 10, bos_token='w1', eos_token='w2')
    file, whole = (TokenizerRequest.of(str(path)) for path in (folder / 'tokenizer.json', folder))
    assert file.sha256 == whole.sha256
    assert save_tokenizer(str(folder / 'tokenizer.json'), [], tmp_path / 'out')['eos_token_id'] == 2
    (folder / 'tokenizer.json').write_text((folder / 'tokenizer.json').read_text()[:-9])
    with pytest.raises(ValueError, match=r'--tokenizer: .*words is no tokenizer that can be loaded'):
        save_tokenizer(str(folder), [], tmp_path / 'none')


def test_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match='no BOS or no EOS'):
        save_tokenizer(word_tokenizer(tmp_path / 't', 10, bos_token='w1'), [], tmp_path / 'none')


def test_model_that_is_not_like_llama_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f'some words number {n} and more of them' for n in range(200)),
        model_prefix=str(tmp_path / 'uni'),
        vocab_size=40,
        model_type='unigram',
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r'uni\.model'):
        from_sentencepiece(tmp_path / 'uni.model')


def test_paths_are_not_looked_up_on_a_hub(tmp_path):
    for missing in (str(tmp_path / 'nothing'), 'nothing.model', './nothing'):
        with pytest.raises(ValueError, match='does not exist'):
            TokenizerRequest.of(missing)
    with pytest.raises(ValueError, match='holds neither'):
        TokenizerRequest.of(str(tmp_path))
