"""Tokenizers: LLaMA's against sentencepiece itself, the trained one, and those that cannot be used."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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
            for _, line in zip(range(5), lines, strict=False):
                yield json.loads(line)['text'][:10_000]


def test_llama_gives_the_ids_of_sentencepiece(shared, tmp_path):
    from sentencepiece import SentencePieceProcessor

    llama_tokenizer = shared / 'data/llama_tokenizer'
    oracle = SentencePieceProcessor(model_file=str(llama_tokenizer / 'tokenizer.model'))
    saved = save_tokenizer(str(llama_tokenizer), [], tmp_path / 'tokenizer')
    assert (saved['vocab_size'], saved['bos_token_id'], saved['eos_token_id']) == (32000, 1, 2)
    ours, hugging_face = load_saved(tmp_path / 'tokenizer'), AutoTokenizer.from_pretrained(tmp_path / 'tokenizer')
    texts = list(sample_texts(shared / 'data/redpajama_sample'))
    assert len(texts) > 40
    for text in texts + ODD_TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == oracle.encode(text), text[:50]
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


def word_tokenizer(folder, size, holes=(), **special):
    vocabulary = {f'w{n}': n for n in range(size) if n not in holes}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token='w0'))
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)
    return str(folder)


def test_vocabulary_must_fit_uint16(tmp_path):
    fits = word_tokenizer(tmp_path / 'fits', 65536, bos_token='w1', eos_token='w2')
    assert save_tokenizer(fits, [], tmp_path / 'out')['vocab_size'] == 65536
    too_large = word_tokenizer(tmp_path / 'large', 65537, bos_token='w1', eos_token='w2')
    with pytest.raises(ValueError, match=r'ids up to 65536.*at most 65536'):
        save_tokenizer(too_large, [], tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


def test_a_vocabulary_with_holes_is_as_large_as_its_largest_id(tmp_path):
    holed = word_tokenizer(tmp_path / 'holed', 10, holes=range(3, 9), bos_token='w1', eos_token='w2')
    assert save_tokenizer(holed, [], tmp_path / 'out')['vocab_size'] == 10
    too_large = word_tokenizer(tmp_path / 'large', 65537, holes=range(3, 9), bos_token='w1', eos_token='w2')
    with pytest.raises(ValueError, match='ids up to 65536'):
        save_tokenizer(too_large, [], tmp_path / 'none')


def test_a_tokenizer_json_is_taken_with_what_stands_beside_it(tmp_path):
    folder = tmp_path / 'words'
    word_tokenizer(folder, 10, bos_token='w1', eos_token='w2')
    file, whole = (TokenizerRequest.of(str(path)) for path in (folder / 'tokenizer.json', folder))
    assert file.sha256 == whole.sha256
    assert save_tokenizer(str(folder / 'tokenizer.json'), [], tmp_path / 'out')['eos_token_id'] == 2
    (folder / 'tokenizer.json').write_text((folder / 'tokenizer.json').read_text()[:-9])
    with pytest.raises(ValueError, match=r'TOKENIZER: .*words is no tokenizer that can be loaded'):
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
