"""Deduplication: no document, and no longer paragraph, occurs twice in a corpus.

Paragraphs are compared by their ASCII letters in lower case and their other characters beyond ASCII. So two that
differ in white space, punctuation or numbers only are the same.
"""

from __future__ import annotations

import re
import string

import xxhash

LEAST_LETTERS = 80
"""Shorter paragraphs may occur again; they are headings, list items, single lines of code."""
LEAST_CHARACTERS = 200
"""A shorter document is left out."""
LEAST_FRACTION = 0.5
"""A document of which less is new is left out."""
_NO_LETTERS = bytes(i for i in range(128) if chr(i) not in string.ascii_lowercase)


class Deduplicator:
    """Knows the paragraphs of all documents so far."""

    def __init__(self) -> None:
        self._documents: set[int] = set()
        self._paragraphs: set[int] = set()

    def new_text(self, text: str) -> str | None:
        """Return a document without the paragraphs of earlier ones; None where little or nothing of it is new."""
        if len(text) < LEAST_CHARACTERS:
            return None
        kept, hashes = [], []
        for paragraph in re.split(r'\n\s*?\n', text):
            letters = paragraph.lower().encode().translate(None, _NO_LETTERS)
            if len(letters) >= LEAST_LETTERS:
                digest = xxhash.xxh3_64_intdigest(letters)
                if digest in self._paragraphs:
                    continue
                hashes.append(digest)
            kept.append(paragraph)
        new = '\n\n'.join(kept)
        whole = xxhash.xxh3_64_intdigest(new.encode())
        if len(new) < max(LEAST_CHARACTERS, LEAST_FRACTION * len(text)) or whole in self._documents:
            return None
        self._documents.add(whole)
        self._paragraphs.update(hashes)
        return new
