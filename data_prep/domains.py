"""Domains of a RedPajama tree: their names, files and shares.

A source is a folder with one sub-folder per domain. The names of the LLM-Shearing sample and those of the 1T release
both map to LLM-Shearing's; a folder with another name is a domain of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.reader import SUFFIXES

# LLM-Shearing's proportions of training tokens for RedPajama, the paper's recipe.
PROPORTIONS = {
    'cc': 0.67,
    'c4-rp': 0.15,
    'github': 0.045,
    'wiki': 0.045,
    'book': 0.045,
    'arxiv': 0.025,
    'stackexchange': 0.02,
}
ALIASES = {'common_crawl': 'cc', 'commoncrawl': 'cc', 'c4': 'c4-rp', 'wikipedia': 'wiki', 'books': 'book'}


@dataclass(frozen=True)
class SourceFile:
    """One input file, as it was when it was listed."""

    domain: str
    path: str
    """Relative to the source folder, with forward slashes."""
    bytes: int
    mtime_ns: int


def find_files(source: Path) -> list[SourceFile]:
    """All data files of a source folder, sorted by domain and path.

    Raises a ValueError if the folder is missing, has no domain folders, or has a domain without a data file.
    """
    if not source.is_dir():
        raise ValueError(f'SOURCE: {source} is not a folder; give one with a sub-folder for each domain')
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if not folders:
        raise ValueError(f'SOURCE: {source} has no domain folders; put the files at {source}/<domain>/*.jsonl')
    folder_of: dict[str, Path] = {}
    files: list[SourceFile] = []
    for folder in folders:
        domain = ALIASES.get(folder.name, folder.name)
        if domain in folder_of:
            raise ValueError(f'SOURCE: {folder_of[domain].name} and {folder.name} in {source} are both domain {domain}')
        folder_of[domain] = folder
        found = _files_under(folder, domain, source)
        if not any(file.bytes for file in found):
            raise ValueError(
                f'SOURCE: domain {folder} is empty: no data in {", ".join("*" + s for s in SUFFIXES)} files; '
                'add them or remove the folder'
            )
        files += found
    return sorted(files, key=lambda file: (file.domain, file.path))


def _files_under(folder: Path, domain: str, source: Path) -> list[SourceFile]:
    def fail(error: OSError) -> None:
        raise ValueError(f'SOURCE: cannot read {error.filename}: {error.strerror}')

    found = []
    for parent, _, names in os.walk(folder, onerror=fail, followlinks=True):
        for name in names:
            if name.endswith(SUFFIXES):
                path = Path(parent, name)
                stat = path.stat()
                found.append(SourceFile(domain, path.relative_to(source).as_posix(), stat.st_size, stat.st_mtime_ns))
    return found


def missing_domains(domains: Mapping[str, object]) -> list[str]:
    """RedPajama domains that a source with at least one of them lacks."""
    if not any(name in PROPORTIONS for name in domains):
        return []
    return [name for name in PROPORTIONS if name not in domains]


def shares(tokens: Mapping[str, float]) -> dict[str, float]:
    """Each domain's share of a token budget, given the domains' sizes in tokens. The shares sum to 1.

    RedPajama's domains together get what they have by size, and divide it by LLM-Shearing's proportions; any other
    domain gets its share by size.
    """
    total = sum(tokens.values())
    known = {name: PROPORTIONS[name] for name in tokens if name in PROPORTIONS}
    known_by_size = sum(tokens[name] for name in known) / total
    return {
        name: known_by_size * known[name] / sum(known.values()) if name in known else tokens[name] / total
        for name in tokens
    }


def too_short(domain: str, held: str, seq_len: int) -> str:
    """What to tell a user whose domain does not fill one training row."""
    return (
        f'SOURCE: domain {domain} has {held}, less than a row of {seq_len} tokens; '
        'lower SEQ_LEN, or leave the domain out'
    )
