"""Where a text may be cut so that the tokens of its parts are those of the complete text.

A BPE merges two neighbouring tokens only by a rule of its list. So where no rule merges a token that ends with the
character before a place with one that begins with the character after it, no merge crosses the place: it is a BPE
boundary. That decides for tokenizers whose other steps see single characters: sentencepiece models like LLaMA's.
Tokenizers that first split a text by a pattern are cut after a newline or before a space, between letters, where the
patterns of GPT-2 and Llama 3 split too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_BOUNDARY_AFTER_NEWLINE = re.compile(r'(?<=[^\W\d_]\n)(?=[^\W\d_])')
_BOUNDARY_BEFORE_SPACE = re.compile(r'(?<=[^\W\d_])(?= [^\W\d_])')
_BYTE_PIECES = {f'<0x{byte:02X}>' for byte in range(256)}
_ASCII = {chr(code) for code in range(128)}

# The place for a boundary in text[start:end], or None.
FindBoundary = Callable[[str, int, int], int | None]


@dataclass(frozen=True)
class MergeablePairs:
    """What decides between two characters of a text whether a merge may cross a boundary there."""

    pairs: set[tuple[str, str]]
    """Last and first character of tokens that a rule merges, as they are after normalising."""
    normalised: dict[str, str]
    """What single characters become before the merges, where that is something else."""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> MergeablePairs | None:
        """From a ``tokenizer.json``; None if something else than two characters decides."""
        model = saved['model']
        if model['type'] != 'BPE' or not model.get('byte_fallback') or not model['vocab'].keys() >= _BYTE_PIECES:
            return None
        if any(model.get(k) for k in ('dropout', 'ignore_merges', 'continuing_subword_prefix', 'end_of_word_suffix')):
            return None
        # Others than special ones are looked for in the text before anything else.
        if not all(token['special'] for token in saved['added_tokens']):
            return None
        if any(part in _BYTE_PIECES for rule in model['merges'] for part in rule):
            return None
        characters: dict[str, str] = {}
        for step in steps(saved['normalizer'], 'normalizers'):
            pattern = step.get('pattern', {}).get('String', '')
            if step['type'] == 'Replace' and len(pattern) == len(step['content']) == 1:
                _replace(characters, pattern, step['content'])
            elif step['type'] != 'Prepend':
                return None
        for step in steps(saved['pre_tokenizer'], 'pretokenizers'):
            if step['type'] == 'Metaspace':
                _replace(characters, ' ', step['replacement'])
            elif step['type'] != 'Split' or len(step['pattern'].get('String', '')) != 1:
                return None
        return cls({(left[-1], right[0]) for left, right in model['merges']}, characters)

    def mergeable(self, before: str, after: str) -> bool:
        """Whether a merge may cross the place between two characters of a text."""
        return (self._normal(before), self._normal(after)) in self.pairs

    def boundary(self, text: str, start: int, end: int) -> int | None:
        """A ``FindBoundary``: a paragraph's end if there is one, else the last place of all."""
        newline = text.rfind('\n', start + 1, end)
        if newline > 0 and not self.mergeable(text[newline - 1], '\n'):
            return newline
        return next((at for at in range(end - 1, start, -1) if not self.mergeable(text[at - 1], text[at])), None)

    def words(self) -> re.Pattern[str] | None:
        """A pattern that cuts a text at boundaries, into words; None if rules merge a word with what follows.

        A word is a run of letters, or of other characters, with the spaces in front of it. (If a rule merges a letter
        with another character, the two are one kind.) A character that no rule takes is a word of its own; of ASCII
        only the newline is, so that numbers are not cut into digits.
        """
        space = self._normal(' ')
        taken = {character for pair in self.pairs for character in pair}
        if any(after == space != before for before, after in self.pairs):
            return None
        if '\n' in taken | self.normalised.keys() | set(self.normalised.values()):
            return None
        letters = {character for character in taken if character.isalpha()}
        if any((before in letters) != (after in letters) for before, after in self.pairs if before != space):
            letters = set()
        kinds: dict[str, set[str]] = {'space': set(), 'letter': set(), 'other': set()}
        for character in (taken | _ASCII | self.normalised.keys()) - {'\n'}:
            normal = self._normal(character)
            kinds['space' if normal == space else 'letter' if normal in letters else 'other'].add(character)
        spaces = _class(kinds['space'])
        runs = [f'{spaces}*{_class(kinds[kind])}+' for kind in ('letter', 'other') if kinds[kind]]
        return re.compile('|'.join([*runs, f'{spaces}+', '.']), re.DOTALL)

    def _normal(self, character: str) -> str:
        return self.normalised.get(character, character)


def _class(characters: Iterable[str]) -> str:
    return f'[{re.escape("".join(sorted(characters)))}]'


def _replace(normalised: dict[str, str], old: str, new: str) -> None:
    """Add a step that replaces a character to those before it."""
    for character, result in normalised.items():
        if result == old:
            normalised[character] = new
    normalised.setdefault(old, new)


def pattern_boundary(text: str, start: int, end: int) -> int | None:
    """A ``FindBoundary`` for any other tokenizer: the last one after a newline if there is one, else before a space."""
    for pattern in (_BOUNDARY_AFTER_NEWLINE, _BOUNDARY_BEFORE_SPACE):
        places = [match.start() for match in pattern.finditer(text, start + 1, end)]
        if places:
            return places[-1]
    return None


def steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer of a ``tokenizer.json``."""
    if part is None:
        return []
    return part[name] if part['type'] == 'Sequence' else [part]
