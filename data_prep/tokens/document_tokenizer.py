"""Documents of any length to their tokens, a bounded amount of text at a time.

Long texts are cut into segments at boundaries (``bpe_boundaries``); their tokens are those of the complete text.
Where a text has no boundary near the end of a segment, it is cut all the same: the tokens beside that cut, one in
``SEGMENT_CHARACTERS``, may then differ from those of the complete text. They still decode to the text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_prep.tokens.bpe_boundaries import FindBoundary, MergeablePairs, pattern_boundary, steps
from data_prep.tokens.tokenizer import from_json, saved_sha256, token_dtype
from data_prep.tokens.word_cache import WordCacheTokenizer
from itt_composer.data_folder import vocabulary_size

# A text of up to this many characters is one segment. The tokenizer's result takes some hundred times as many bytes.
SEGMENT_CHARACTERS = 1 << 18
# How far back from there a place for a boundary is looked for.
_SEARCH_CHARACTERS = 1 << 14


class DocumentTokenizer:
    """The ids of documents, from the tokenizer in a folder that ``save_tokenizer`` wrote.

    Word by word where the tokenizer allows it, which is faster.
    """

    def __init__(self, folder: Path):
        content = (folder / 'tokenizer.json').read_text(encoding='utf-8')
        saved = json.loads(content)
        self._first = from_json(content)
        self._later = _continuation(saved, self._first)
        self._dtype = token_dtype(vocabulary_size(self._first))
        pairs = MergeablePairs.of(saved)
        self._boundary = pattern_boundary if pairs is None else pairs.boundary
        word = None if pairs is None else pairs.words()
        self._words = None if word is None else WordCacheTokenizer(word, self._first, self._later, self._dtype)

    def ids(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Ids of each text, without BOS and EOS."""
        short = iter(self._ids([text for text in texts if len(text) <= SEGMENT_CHARACTERS]))
        for text in texts:
            if len(text) <= SEGMENT_CHARACTERS:
                yield next(short)
            else:
                parts = [self._ids([part], i == 0)[0] for i, part in enumerate(segments(text, self._boundary))]
                yield np.concatenate(parts)

    def _ids(self, texts: Sequence[str], begin: bool = True) -> list[np.ndarray]:
        """Ids of segments; ``begin``: they are beginnings of documents, not continuations."""
        if self._words is not None:
            return self._words.ids(texts, begin)
        tokenizer = self._first if begin else self._later
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]


def load_document_tokenizer(folder: Path) -> DocumentTokenizer:
    """This process's tokenizer of a folder, with the words that it has met; a forked process has its parent's."""
    return _cached(folder.absolute(), saved_sha256(folder))


@functools.lru_cache(maxsize=1)
def _cached(folder: Path, sha256: str) -> DocumentTokenizer:
    return DocumentTokenizer(folder)


def segments(text: str, boundary: FindBoundary) -> Iterator[str]:
    """Cut a text into parts of at most ``SEGMENT_CHARACTERS``."""
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        limit = start + SEGMENT_CHARACTERS
        end = boundary(text, limit - _SEARCH_CHARACTERS, limit)
        yield text[start : limit if end is None else end]
        start = limit if end is None else end
    yield text[start:]


def _continuation(saved: dict[str, Any], first: Tokenizer) -> Tokenizer:
    """The same tokenizer for the continuation of a text: nothing is put in front of it."""
    normalizers = [step for step in steps(saved['normalizer'], 'normalizers') if step['type'] != 'Prepend']
    pre_tokenizers = [
        step
        | ({'prepend_scheme': 'never'} if step['type'] == 'Metaspace' else {})
        | ({'add_prefix_space': False} if step['type'] == 'ByteLevel' else {})
        for step in steps(saved['pre_tokenizer'], 'pretokenizers')
    ]
    parts = {
        'normalizer': {'type': 'Sequence', 'normalizers': normalizers},
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': pre_tokenizers},
    }
    if not all(token['special'] for token in saved['added_tokens']):
        return from_json(json.dumps(saved | parts))
    # Special tokens are not looked for in a text; so the vocabulary, which takes long to load, is all that is shared.
    model = {'type': 'BPE', 'vocab': {}, 'merges': []}
    later = from_json(json.dumps(saved | parts | {'model': model, 'added_tokens': [], 'post_processor': None}))
    later.model = first.model
    return later
