"""The tokenizer of a conversion: any of the accepted forms in, one self-contained Hugging Face folder out.

transformers is imported only where a tokenizer is made: recognising a finished conversion takes no such time.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from itt_composer.atomic import atomic_folder
from itt_composer.data_folder import vocabulary_size

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

TRAINED_VOCABULARY = 4096
TRAINED_PREFIX = 'bpe:'
# A token for each byte, and the special ones.
_LEAST_VOCABULARY = 256 + 3
_CONTENT_FILES = ('tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json')
_HUB_ID = re.compile(r'\w[\w.-]*(/[\w.-]+)?')
# What a converted sentencepiece model must tokenise as sentencepiece does, beyond texts of its own pieces.
_PROBES = (
    'Plain text, a number: 12345.67!',
    ' leading,  double   and trailing  ',
    'tabs\tand\n\nlines\r\n  indented\n',
    'é ß 漢字 🙂 \u2581 \u00a0 \ufb01 \x00',
    '<s> </s> <unk> <0x0A>',
)
_PROBE_PIECES = 40


@dataclass(frozen=True)
class TokenizerRequest:
    """Which tokenizer was asked for, and a fingerprint of it that needs no conversion."""

    name: str
    sha256: str

    @classmethod
    def of(cls, tokenizer: str | None) -> TokenizerRequest:
        """Of a ``tokenizer.model``, a folder, a hub id, or one trained on the corpus: ``bpe:2048``, or None.

        Raises a ValueError if it is a path to nothing, a folder without a tokenizer, or a bad size after ``bpe:``.
        """
        if (vocabulary := _trained_vocabulary(tokenizer)) is not None:
            name = f'byte-level BPE of {vocabulary} tokens, trained on the corpus'
            return cls(name, hashlib.sha256(name.encode()).hexdigest())
        assert tokenizer is not None
        path = _place(tokenizer)
        if path.is_dir():
            files = [path / name for name in _CONTENT_FILES if (path / name).is_file()]
            if not any(file.name in _CONTENT_FILES[:2] for file in files):
                raise ValueError(f'--tokenizer: {path} holds neither tokenizer.json nor tokenizer.model')
        elif path.is_file():
            files = [path]
        elif tokenizer.endswith(('.model', '.json')) or not _HUB_ID.fullmatch(tokenizer):
            raise ValueError(f'--tokenizer: {tokenizer} does not exist; pass a tokenizer.model, a folder or a hub id')
        else:
            return cls(tokenizer, hashlib.sha256(f'hub:{tokenizer}'.encode()).hexdigest())
        return cls(tokenizer, _hash_files(files))


def save_tokenizer(tokenizer: str | None, corpus: Iterable[str], folder: Path) -> dict[str, int | str]:
    """Write the tokenizer to ``folder`` so that ``AutoTokenizer.from_pretrained`` loads it without a hub.

    ``corpus`` is read only where a tokenizer is trained. Returns what a manifest says of it: ``sha256`` of
    tokenizer.json, ``vocab_size``, ``token_dtype``, ``bos_token_id``, ``eos_token_id``. Raises a ValueError if it
    cannot be loaded or has no BOS or EOS.
    """
    vocabulary = _trained_vocabulary(tokenizer)
    fast = _load(str(tokenizer)) if vocabulary is None else train(corpus, vocabulary)
    size = vocabulary_size(fast.backend_tokenizer)
    if fast.bos_token_id is None or fast.eos_token_id is None:
        raise ValueError(f'--tokenizer: {tokenizer} has no BOS or no EOS token; pass one with both')
    # Also where a class has a default of its own, as Qwen's.
    fast.pad_token = fast.init_kwargs['pad_token'] = _padding(fast)
    with atomic_folder(folder, own=lambda there: True) as partial:
        fast.save_pretrained(partial)
    return {
        'sha256': saved_sha256(folder),
        'vocab_size': size,
        'token_dtype': token_dtype(size).name,
        'bos_token_id': fast.bos_token_id,
        'eos_token_id': fast.eos_token_id,
    }


def _padding(fast: PreTrainedTokenizerFast) -> str | None:
    """A token for padding that no sequence of the data holds: the loss leaves out every token that is the padding's.

    The tokenizer's own, or the unknown token as is usual for LLaMA; None if a document can hold both.
    """
    rust = from_json(fast.backend_tokenizer.to_str())
    held = {fast.bos_token_id, fast.eos_token_id}
    held |= {i for probe in _PROBES for i in rust.encode(probe, add_special_tokens=False).ids}
    tokens = [token for token in (fast.pad_token, fast.unk_token) if token is not None]
    return next((token for token in tokens if fast.convert_tokens_to_ids(token) not in held), None)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type of the shards that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def load_saved(folder: Path) -> Tokenizer:
    """The Rust tokenizer of a folder that ``save_tokenizer`` wrote, set to see no special tokens in a text."""
    return from_json((folder / 'tokenizer.json').read_text(encoding='utf-8'))


def from_json(content: str) -> Tokenizer:
    """The Rust tokenizer that a tokenizer.json describes, set to see no special tokens in a text."""
    fast = Tokenizer.from_str(content)
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = True
    return fast


def saved_sha256(folder: Path) -> str:
    """Fingerprint of a folder that ``save_tokenizer`` wrote."""
    return hashlib.sha256((folder / 'tokenizer.json').read_bytes()).hexdigest()


def _trained_vocabulary(tokenizer: str | None) -> int | None:
    """Tokens of the BPE to train: those after ``bpe:``, the default for None; None for a tokenizer that exists."""
    if tokenizer is None:
        return TRAINED_VOCABULARY
    if not tokenizer.startswith(TRAINED_PREFIX):
        return None
    size = tokenizer.removeprefix(TRAINED_PREFIX)
    if not size.isdecimal() or int(size) < _LEAST_VOCABULARY:
        raise ValueError(f'--tokenizer: {tokenizer}: expected bpe: and a number of tokens from {_LEAST_VOCABULARY} on')
    return int(size)


def train(corpus: Iterable[str], vocabulary: int = TRAINED_VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``corpus``: unknown and padding id 0, BOS 1, EOS 2. Same corpus, same tokenizer."""
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    special = ['<unk>', '<s>', '</s>']
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token='<unk>',
        pad_token='<unk>',
        bos_token='<s>',
        eos_token='</s>',
        clean_up_tokenization_spaces=False,
    )


def _place(tokenizer: str) -> Path:
    """The folder or the sentencepiece model; what stands beside a tokenizer.json says which tokens are BOS and EOS."""
    path = Path(tokenizer).expanduser()
    return path.parent if path.name == 'tokenizer.json' and path.is_file() else path


def _load(tokenizer: str) -> PreTrainedTokenizerFast:
    path = _place(tokenizer)
    if path.is_dir() and not (path / 'tokenizer.json').is_file():
        path = path / 'tokenizer.model'
    if path.is_file():
        return from_sentencepiece(path)
    from transformers import AutoTokenizer

    local = path.is_dir()
    try:
        fast = AutoTokenizer.from_pretrained(str(path) if local else tokenizer, local_files_only=local)
    except Exception as error:  # tokenizers' Rust raises bare ones
        raise ValueError(f'--tokenizer: {tokenizer} is no tokenizer that can be loaded: {error}') from error
    if not fast.is_fast:
        raise ValueError(f'--tokenizer: {tokenizer} has no fast version; pass one with a tokenizer.json')
    return fast


def from_sentencepiece(model: Path) -> PreTrainedTokenizerFast:
    """LLaMA's fast tokenizer with a sentencepiece model's own ids; raises a ValueError if any ids would differ."""
    from sentencepiece import SentencePieceProcessor
    from transformers.models.llama.tokenization_llama_fast import LlamaTokenizerFast

    try:
        oracle = SentencePieceProcessor(model_file=str(model))
        special = {
            f'{name}_token': oracle.id_to_piece(i)
            for name, i in (('bos', oracle.bos_id()), ('eos', oracle.eos_id()), ('unk', oracle.unk_id()))
            if i >= 0
        }
        if len(special) < 3:
            raise ValueError(f'expected BOS, EOS and UNK tokens, got {" and ".join(special) or "none"}')
        if oracle.pad_id() >= 0:
            special['pad_token'] = oracle.id_to_piece(oracle.pad_id())
        # Without add_prefix_space the conversion loses the space that LLaMA puts before a text.
        fast = LlamaTokenizerFast(vocab_file=str(model), add_prefix_space=True, legacy=True, **special)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f'--tokenizer: {model} is no sentencepiece model that can be converted: {error}') from error
    # Saved, it would have transformers convert the model again whenever the tokenizer is loaded.
    del fast.init_kwargs['add_prefix_space']
    rust = fast.backend_tokenizer
    # sentencepiece merges over a complete document, which takes long on long ones. Where no piece holds a newline and
    # something else, merging line by line gives the same tokens.
    if not any('\n' in piece and piece != '\n' for piece in rust.get_vocab()):
        rust.pre_tokenizer = pre_tokenizers.Split('\n', 'merged_with_next')
    rust.encode_special_tokens = True
    for probe in (*_PROBES, *_texts_of_pieces(oracle)):
        if rust.encode(probe, add_special_tokens=False).ids != oracle.encode(probe):
            raise ValueError(
                f'--tokenizer: {model} is not a model like LLaMA (it may have user-defined symbols): converted, it '
                f'tokenises {probe[:60]!r} in another way than sentencepiece; pass a Hugging Face folder of it'
            )
    rust.encode_special_tokens = False
    return fast


def _texts_of_pieces(oracle: SentencePieceProcessor) -> Iterator[str]:
    """Texts in which each ordinary piece and user-defined symbol stands between others."""
    hidden = (oracle.is_control, oracle.is_unknown, oracle.is_unused, oracle.is_byte)
    ids = [i for i in range(oracle.get_piece_size()) if not any(kind(i) for kind in hidden)]
    pieces = [oracle.id_to_piece(i).replace('\u2581', ' ') for i in ids]
    random.Random(0).shuffle(pieces)
    for start in range(0, len(pieces), _PROBE_PIECES):
        yield ''.join(pieces[start : start + _PROBE_PIECES])
        yield ' '.join(pieces[start : start + _PROBE_PIECES])


def _hash_files(files: list[Path]) -> str:
    names = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    # One file is the same tokenizer whether it or its folder was named.
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
