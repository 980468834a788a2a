"""Long texts in segments: what a tokenizer is given at once is bounded, and its tokens are those of the whole text.

A BPE merges two neighbours only into a piece of its vocabulary. So where no piece holds the two characters beside a
seam, in this order, no merge crosses it, and the segments' tokens are the whole text's. That decides for tokenizers
whose other steps see single characters (sentencepiece models like LLaMA's). Tokenizers that first split a text by a
pattern are cut after a newline or before a space, between letters, which the patterns of GPT-2 and Llama 3 split too.

The bound, where a text has no such place: one seam in ``SEGMENT_CHARACTERS``, beside which the tokens may differ from
those of the whole text. They still decode to the text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.tokenizer import from_json

# A text of up to so many characters is one segment. The tokenizer's result takes some hundred times as many bytes.
SEGMENT_CHARACTERS = 1 << 18
# How far back from there a place for a seam is looked for.
_SEARCH_CHARACTERS = 1 << 14
_SEAM_AFTER_NEWLINE = re.compile(r'(?<=[^\W\d_]\n)(?=[^\W\d_])')
_SEAM_BEFORE_SPACE = re.compile(r'(?<=[^\W\d_])(?= [^\W\d_])')

# The place for a seam in text[start:end], or None.
Seam = Callable[[str, int, int], int | None]


class DocumentTokenizer:
    """The ids of documents of any length, from the tokenizer in a folder that ``save_tokenizer`` wrote."""

    def __init__(self, folder: Path):
        self._saved = (folder / 'tokenizer.json').read_text(encoding='utf-8')
        self._first = from_json(self._saved)
        self._later: tuple[Tokenizer, Seam] | None = None

    def ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Ids of each text, without BOS and EOS."""
        short = [text for text in texts if len(text) <= SEGMENT_CHARACTERS]
        encoded = iter(self._first.encode_batch_fast(short, add_special_tokens=False))
        for text in texts:
            yield next(encoded).ids if len(text) <= SEGMENT_CHARACTERS else self._long(text)

    def _long(self, text: str) -> list[int]:
        if self._later is None:
            saved = json.loads(self._saved)
            self._later = from_json(json.dumps(_without_prefix(saved))), seam_of(saved)
        tokenizer, (later, seam) = self._first, self._later
        ids: list[int] = []
        for segment in segments(text, seam):
            ids += tokenizer.encode_batch_fast([segment], add_special_tokens=False)[0].ids
            tokenizer = later
        return ids


def segments(text: str, seam: Seam) -> Iterator[str]:
    """Cut a text into parts of at most ``SEGMENT_CHARACTERS``."""
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        limit = start + SEGMENT_CHARACTERS
        end = seam(text, limit - _SEARCH_CHARACTERS, limit)
        yield text[start : limit if end is None else end]
        start = limit if end is None else end
    yield text[start:]


def seam_of(saved: dict[str, Any]) -> Seam:
    """Where the tokenizer of a ``tokenizer.json`` lets a text be cut."""
    normalised = _normalised_characters(saved)
    return _pattern_seam if normalised is None else _bpe_seam(saved, normalised)


def _bpe_seam(saved: dict[str, Any], normalised: dict[str, str]) -> Seam:
    pieces = [*saved['model']['vocab'], *(token['content'] for token in saved['added_tokens'])]
    joined = {pair for piece in pieces for pair in itertools.pairwise(piece)}

    def cut(text: str, start: int, end: int) -> int | None:
        def clean(at: int) -> bool:
            before, after = text[at - 1], text[at]
            return (normalised.get(before, before), normalised.get(after, after)) not in joined

        # A paragraph's end if there is one, else the last place of all.
        newline = text.rfind('\n', start + 1, end)
        if newline > 0 and clean(newline):
            return newline
        return next((at for at in range(end - 1, start, -1) if clean(at)), None)

    return cut


def _pattern_seam(text: str, start: int, end: int) -> int | None:
    for pattern in (_SEAM_AFTER_NEWLINE, _SEAM_BEFORE_SPACE):
        places = [match.start() for match in pattern.finditer(text, start + 1, end)]
        if places:
            return places[-1]
    return None


def _normalised_characters(saved: dict[str, Any]) -> dict[str, str] | None:
    """What single characters become before the merges; None if something else than single characters decides."""
    model = saved['model']
    if model['type'] != 'BPE' or not model.get('byte_fallback') or model.get('dropout'):
        return None
    if model.get('continuing_subword_prefix') or model.get('end_of_word_suffix'):
        return None
    characters = {}
    for step in _steps(saved['normalizer'], 'normalizers'):
        pattern = step.get('pattern', {}).get('String', '')
        if step['type'] == 'Replace' and len(pattern) == len(step['content']) == 1:
            characters[pattern] = step['content']
        elif step['type'] != 'Prepend':
            return None
    for step in _steps(saved['pre_tokenizer'], 'pretokenizers'):
        if step['type'] == 'Metaspace':
            characters[' '] = step['replacement']
        elif step['type'] != 'Split' or len(step['pattern'].get('String', '')) != 1:
            return None
    return characters


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[name] if part['type'] == 'Sequence' else [part]


def _without_prefix(saved: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for a text that goes on: nothing is put in front of it."""
    normalizers = [step for step in _steps(saved['normalizer'], 'normalizers') if step['type'] != 'Prepend']
    pre_tokenizers = [
        step
        | ({'prepend_scheme': 'never'} if step['type'] == 'Metaspace' else {})
        | ({'add_prefix_space': False} if step['type'] == 'ByteLevel' else {})
        for step in _steps(saved['pre_tokenizer'], 'pretokenizers')
    ]
    return saved | {
        'normalizer': {'type': 'Sequence', 'normalizers': normalizers},
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': pre_tokenizers},
    }
