"""Texts word by word: each distinct word is tokenised once and then looked up.

Most words of a text are words that came before, so a look-up is most of the work, and it is several times as fast as
the tokenizer. Words are cut at boundaries (``bpe_boundaries``), so their tokens in a row are those of the text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Encoding, Tokenizer

# Words cached: at most twice as many, of at most this many characters. With its tokens and what Python adds, a word of
# the RedPajama sample takes 124 bytes: 33 MB in all; words of the greatest length, four times that.
_WORDS = 1 << 17
_LONGEST_WORD = 64
# Words given to the tokenizer as one text.
_JOINED_WORDS = 100


class WordCacheTokenizer:
    """The ids of texts, from a bounded store of words.

    ``word`` is what ``MergeablePairs.words`` returns. ``first`` is the tokenizer for the beginning of a text, ``later``
    the one for its continuation.
    """

    def __init__(self, word: re.Pattern[str], first: Tokenizer, later: Tokenizer, dtype: np.dtype):
        self._word = word
        self._dtype = dtype
        self._first = first
        self._later = later
        # A newline is a word, and no other word has its token: it stands between the words of a joined text.
        (self._newline,) = later.encode('\n', add_special_tokens=False).ids
        # Words used of late, and those of the time before: what is used in neither is forgotten.
        self._recent: dict[str, bytes] = {}
        self._before: dict[str, bytes] = {}

    def ids(self, texts: Sequence[str], begin: bool = True) -> list[np.ndarray]:
        """Ids of each text; ``begin``: they are beginnings of documents, not continuations."""
        matches = [self._word.match(text) if begin else None for text in texts]
        heads = [match.group() if match else '' for match in matches]
        words = [self._word.findall(text, len(head)) for text, head in zip(texts, heads, strict=True)]
        passing = self._learn(set().union(*words))
        known = self._recent.__getitem__
        encoded = self._first.encode_batch_fast(heads, add_special_tokens=False)
        ids = [
            np.frombuffer(b''.join(itertools.chain([self._ids(head).tobytes()], map(known, rest))), self._dtype)
            for head, rest in zip(encoded, words, strict=True)
        ]
        for word in passing:
            del self._recent[word]
        return ids

    def _learn(self, words: set[str]) -> list[str]:
        """Have all of these words among the recent ones; returns those that are too long to stay."""
        if len(self._recent) > _WORDS:
            self._before, self._recent = self._recent, {}
        missing = words.difference(self._recent)
        again = missing.intersection(self._before)
        self._recent |= {word: self._before[word] for word in again}
        new = list(missing - again - {'\n'})
        self._recent |= zip(new, self._tokenise(new), strict=True)
        self._recent['\n'] = self._dtype.type(self._newline).tobytes()
        return [word for word in new if len(word) > _LONGEST_WORD]

    def _tokenise(self, words: list[str]) -> Iterator[bytes]:
        """Ids of each word, from texts of many words: a call of the tokenizer takes longer than a word."""
        starts = range(0, len(words), _JOINED_WORDS)
        texts = ['\n'.join([*words[start : start + _JOINED_WORDS], '']) for start in starts]
        for encoding in self._later.encode_batch_fast(texts, add_special_tokens=False):
            ids_N = self._ids(encoding)
            start = 0
            for end in np.flatnonzero(ids_N == self._newline).tolist():
                yield ids_N[start:end].tobytes()
                start = end + 1

    def _ids(self, encoding: Encoding) -> np.ndarray:
        return np.array(encoding.ids, self._dtype)
