"""Which documents are for validation: those whose text hashes below their domain's threshold.

The rule sees only the text, so file order, file names and workers cannot change it. The thresholds come from a look
at each domain before the work starts (its census).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.input.domains import shares
from data_prep.input.formats import open_documents
from data_prep.input.reader import BadLine, Document
from data_prep.input.sources import SourceFile
from data_prep.tokens.document_tokenizer import DocumentTokenizer

VALIDATION_SHARES = ('recipe', 'equal')
# At most this share of a domain's text is for validation.
MAX_VALIDATION_SHARE = 0.1
# Up to this size on disk a domain is read completely, and its threshold fits its documents exactly.
FULL_CENSUS_BYTES = 64 << 20
# Of larger domains this number of files is sampled, and this much text read per file.
CENSUS_FILES = 16
CENSUS_FILE_BYTES = 2 << 20
# Text that is tokenised to learn how many tokens a byte makes: in all, and at most of one document.
CENSUS_TOKENISED_BYTES = 512 << 10
CENSUS_TOKENISED_CHARACTERS = 32 << 10


def text_hash(utf8: bytes) -> int:
    """64-bit hash of a document's text."""
    return xxhash.xxh3_64_intdigest(utf8)


@dataclass(frozen=True)
class Census:
    """What is known of a domain before it is converted."""

    hashes: np.ndarray
    """uint64 hash of each document read."""
    sizes: np.ndarray
    """int64 bytes of text of each document read."""
    tokens_per_byte: float
    text_bytes: float
    """Bytes of text in the complete domain: exact if ``complete``, else an estimate."""
    complete: bool
    """Whether every document was read."""

    @property
    def tokens(self) -> float:
        """Estimated tokens in the domain."""
        return self.tokens_per_byte * self.text_bytes


def read_sample(source: Path, files: Sequence[SourceFile], text_field: str) -> Iterator[tuple[Document | BadLine, int]]:
    """Documents and bad lines to judge a domain by, each with the bytes read so far of the domain's files as stored.

    All documents of a small domain; the beginnings of evenly spaced files of a large one.
    """
    whole = is_small(files)
    step = 1 if whole else max(1, len(files) // CENSUS_FILES)
    before = 0
    for file in files[::step]:
        text_bytes = 0
        with open_documents(source / file.path, text_field) as lines:
            for line in lines:
                text_bytes += len(line.utf8) if isinstance(line, Document) else 0
                yield line, before + lines.position
                if not whole and text_bytes >= CENSUS_FILE_BYTES:
                    break
            before += lines.position


def is_small(files: Sequence[SourceFile]) -> bool:
    """Whether a domain is small enough to be read completely before the work starts."""
    return sum(file.bytes for file in files) <= FULL_CENSUS_BYTES


def take_census(source: Path, files: Sequence[SourceFile], text_field: str, tokenizer: DocumentTokenizer) -> Census:
    """Read a sample of a domain's documents, without empty ones; raises a ValueError if there are none."""
    hashes, sizes, bad, empty = [], [], '', 0
    tokens = tokenised_bytes = read_bytes = 0
    for document, position in read_sample(source, files, text_field):
        if isinstance(document, BadLine):
            bad = bad or f'; the first is bad: {document.reason}'
            continue
        if not document.text:
            empty += 1
            continue
        hashes.append(text_hash(document.utf8))
        sizes.append(len(document.utf8))
        read_bytes = position
        if tokenised_bytes < CENSUS_TOKENISED_BYTES:
            text = document.text[:CENSUS_TOKENISED_CHARACTERS]
            tokens += sum(map(len, tokenizer.ids([text])))
            tokenised_bytes += len(text.encode())
    if tokenised_bytes == 0:
        raise ValueError(
            f'--source: domain {files[0].domain} is empty: no line of {source / files[0].path} has a document'
            f'{f"; {empty} documents are empty" if empty else ""}{bad}'
        )
    complete = is_small(files)
    scale = 1.0 if complete else sum(file.bytes for file in files) / read_bytes
    return Census(
        np.array(hashes, np.uint64), np.array(sizes, np.int64), tokens / tokenised_bytes, scale * sum(sizes), complete
    )


def thresholds(
    censuses: dict[str, Census], validation_tokens: int, validation_shares: str = 'recipe'
) -> dict[str, int]:
    """For each domain the hash below which a document is for validation (0: none), from 0 to 2**64.

    Domains divide ``validation_tokens`` by ``validation_shares``: ``recipe``, as they divide a training run, or
    ``equal``, as in Sheared-LLaMA. No domain holds out more than a tenth of its text.
    """
    share = shares({name: census.tokens for name, census in censuses.items()})
    if validation_shares == 'equal':
        share = dict.fromkeys(censuses, 1 / len(censuses))
    result = {}
    for name, census in censuses.items():
        wanted = min(share[name] * validation_tokens / census.tokens, MAX_VALIDATION_SHARE)
        result[name] = _exact_threshold(census, wanted) if census.complete else int(wanted * 2**64)
    return result


def _exact_threshold(census: Census, wanted: float) -> int:
    """The threshold that gives the share of the text nearest to ``wanted``, without exceeding the maximum."""
    hashes, group = np.unique(census.hashes, return_inverse=True)
    below = np.concatenate([[0], np.cumsum(np.bincount(group, weights=census.sizes))]) / census.text_bytes
    distance = np.where(below <= MAX_VALIDATION_SHARE, np.abs(below - wanted), np.inf)
    count = int(np.argmin(distance))
    return int(hashes[count - 1]) + 1 if count else 0
