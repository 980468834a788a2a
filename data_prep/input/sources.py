"""Where the text comes from: folders of domains, a list of files, a Hugging Face data set. All end up as files.

Deduplication is not done here: give text that has been through it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.input.domains import ALIASES
from data_prep.input.formats import SUFFIXES

HUGGING_FACE = 'hf:'
_LISTS = ('.json', '.yaml', '.yml')


@dataclass(frozen=True)
class SourceFile:
    """One input file, as it was when it was listed."""

    domain: str
    path: str
    """Relative to the source folder, with forward slashes."""
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """The files of a source, sorted by domain and path."""

    folder: Path
    files: list[SourceFile]


def open_source(name: str | Path) -> Source:
    """The source of a name: a folder, a list of files (JSON or YAML), or ``hf:`` and a data set.

    Raises a ValueError if it is missing or cannot be read, has no domains, or has a domain without data.
    """
    if str(name).startswith(HUGGING_FACE):
        from data_prep.input.hugging_face import arrow_files  # datasets takes seconds to import

        return _source(Path('/'), arrow_files(str(name).removeprefix(HUGGING_FACE)))
    path = Path(name)
    if path.is_file() and path.suffix in _LISTS:
        return _source(path.parent, _listed(path))
    if not path.is_dir():
        raise ValueError(
            f'SOURCE: {path} is not a folder; give one with a sub-folder for each domain, a .json or .yaml list of '
            f'files, or {HUGGING_FACE}<data set>'
        )
    return _source(path, _tree(path))


def _tree(source: Path) -> dict[str, list[Path]]:
    try:
        folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith('.'))
    except OSError as error:
        raise _unreadable(error) from error
    if not folders:
        raise ValueError(f'SOURCE: {source} has no domain folders; put the files at {source}/<domain>/*.jsonl')
    return {folder.name: list(_files_under(folder)) for folder in folders}


def _files_under(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise _unreadable(error)

    for parent, _, names in os.walk(folder, onerror=fail, followlinks=True):
        yield from (Path(parent, name) for name in names if name.endswith(SUFFIXES))


def _listed(path: Path) -> dict[str, list[Path]]:
    """``{domain: [file, ...]}``, the files absolute or relative to the list's folder."""
    try:
        # JSON is YAML too. OmegaConf's loader refuses a key that is there twice, where YAML's own takes the last.
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f'SOURCE: {path} cannot be read: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict) or not all(
        isinstance(files, list) and all(isinstance(file, str) for file in files) for files in content.values()
    ):
        raise ValueError(f'SOURCE: {path} is no list of files; it must hold {{domain: [file, ...], ...}}')
    for name, files in content.items():
        for file in files:
            if not file.endswith(SUFFIXES):
                raise ValueError(f'SOURCE: {path}: {file} is not one of {", ".join("*" + s for s in SUFFIXES)}')
        if len({(path.parent / file).resolve() for file in files}) < len(files):
            raise ValueError(f'SOURCE: {path} lists a file of {name!r} twice')
    return {str(name): [path.parent / file for file in files] for name, files in content.items()}


def _source(folder: Path, paths: Mapping[str, list[Path]]) -> Source:
    name_of: dict[str, str] = {}
    files: list[SourceFile] = []
    for name, found in paths.items():
        if name in ('', '.', '..') or '/' in name:
            raise ValueError(f'SOURCE: a domain of {folder} is called {name!r}; its shards need a name for a folder')
        domain = ALIASES.get(name, name)
        if domain in name_of:
            raise ValueError(f'SOURCE: {name_of[domain]} and {name} in {folder} are both domain {domain}')
        name_of[domain] = name
        listed = [_listed_file(domain, path, folder) for path in found]
        if not any(file.bytes for file in listed):
            raise ValueError(
                f'SOURCE: domain {folder / name} is empty: no data in {", ".join("*" + s for s in SUFFIXES)} files; '
                'add them or leave the domain out'
            )
        files += listed
    return Source(folder, sorted(files, key=lambda file: (file.domain, file.path)))


def _listed_file(domain: str, path: Path, folder: Path) -> SourceFile:
    try:
        with open(path, 'rb'):
            stat = path.stat()
    except OSError as error:
        raise _unreadable(error) from error
    name = path.relative_to(folder) if path.is_relative_to(folder) else path
    return SourceFile(domain, name.as_posix(), stat.st_size, stat.st_mtime_ns)


def _unreadable(error: OSError) -> ValueError:
    return ValueError(f'SOURCE: cannot read {error.filename}: {error.strerror}')
