"""Where the text comes from: folders of domains, a list of files, a Hugging Face data set. All end up as files.

Every file of a folder is accounted for: it is read, or listed as left out with the reason. Deduplication is not done
here: pass text that has been through it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.input.domains import ALIASES
from data_prep.input.formats import END_MARKS, PATTERNS, suffix_of

HUGGING_FACE = 'hf:'
_LISTS = ('.json', '.yaml', '.yml')
_BACKUPS = ('~', '.bak', '.old', '.orig', '.tmp', '.swp', '.part', '.partial')
_KINDS = {
    stat.S_IFIFO: 'a named pipe',
    stat.S_IFSOCK: 'a socket',
    stat.S_IFCHR: 'a device',
    stat.S_IFBLK: 'a device',
}


@dataclass(frozen=True)
class SourceFile:
    """One input file, as it was when it was listed."""

    domain: str
    path: str
    """Relative to the source folder, with forward slashes."""
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class LeftOut:
    """A file or folder of the source that is not read."""

    path: str
    """Relative to the source folder, with forward slashes."""
    reason: str


@dataclass(frozen=True)
class Source:
    """The files of a source, sorted by domain and path, and what is left out, sorted by path."""

    folder: Path
    files: list[SourceFile]
    left_out: list[LeftOut]


def open_source(name: str | Path) -> Source:
    """The source of a name: a folder, a list of files (JSON or YAML), or ``hf:`` and a data set.

    Raises a ValueError if it is missing or cannot be read, has no domains, has a domain without data, or has a file
    without its end mark.
    """
    if str(name).startswith(HUGGING_FACE):
        from data_prep.input.hugging_face import arrow_files  # datasets takes seconds to import

        return _source(Path('/'), arrow_files(str(name).removeprefix(HUGGING_FACE)), [])
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in _LISTS:
        return _source(path.parent, _listed(path), [])
    if not path.is_dir():
        raise ValueError(
            f'--source: {path} is not a folder; pass one with a sub-folder per domain, a .json or .yaml list of files, '
            f'or {HUGGING_FACE}<data set>'
        )
    tree = _Tree(path)
    return _source(path, tree.domains, tree.left_out)


@dataclass
class _Tree:
    """The files in the domain folders of a source. Each real file and folder is taken once, however many links it has.

    Links are followed last, so that a file is read where it lies and not where a link to it is.
    """

    source: Path
    domains: dict[str, list[Path]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    _taken: dict[tuple[int, int], Path] = field(default_factory=dict)
    """Device and inode of the files and folders that are taken, with their paths."""
    _links: list[tuple[str, Path]] = field(default_factory=list)
    """Links still to be followed, with their domains."""

    def __post_init__(self) -> None:
        self._take(self.source)
        linked = []
        for entry in self._entries(self.source):
            if reason := _unwanted(entry.name):
                self._leave_out(entry, reason)
            elif not entry.is_dir():
                self._leave_out(entry, self._unreadable_kind(entry) or 'beside the domain folders')
            else:
                self.domains[entry.name] = []
                if entry.is_symlink():
                    linked.append((entry.name, entry))
                else:
                    self._follow(entry.name, entry)
        if not self.domains:
            raise ValueError(
                f'--source: {self.source} has no domain folders; put the files at {self.source}/<domain>/*.jsonl'
            )
        self._links = linked + self._links
        while self._links:
            self._follow(*self._links.pop(0))
        self.left_out.sort(key=lambda one: one.path)

    def _visit(self, domain: str, path: Path) -> None:
        if reason := _unwanted(path.name):
            self._leave_out(path, reason)
        elif path.is_symlink():
            self._links.append((domain, path))
        else:
            self._follow(domain, path)

    def _follow(self, domain: str, path: Path) -> None:
        """Take a file, or what is in a folder, unless it is taken already."""
        if path.is_dir():
            if self._take(path):
                for entry in self._entries(path):
                    self._visit(domain, entry)
        elif reason := self._unreadable_kind(path):
            self._leave_out(path, reason)
        elif suffix_of(path.name) is None:
            backup = path.name.lower().endswith(_BACKUPS)
            self._leave_out(path, 'a backup copy' if backup else f'not one of {PATTERNS}')
        elif path.stat().st_size == 0:
            self._leave_out(path, 'empty, 0 bytes')
        elif self._take(path):
            self.domains[domain].append(path)

    def _take(self, path: Path) -> bool:
        """Whether the real file or folder is new; otherwise it is left out."""
        status = path.stat()
        first = self._taken.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            same = first.relative_to(self.source).as_posix()
            self._leave_out(path, 'leads back to the source' if same == '.' else f'the same as {same}')
        return first is path

    @staticmethod
    def _unreadable_kind(path: Path) -> str | None:
        """Why a path that is no folder is no file either."""
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            return 'a link to nothing'
        except (OSError, RuntimeError):  # RuntimeError: Python's own for a circle
            return 'a link that leads to itself'
        return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), 'no regular file')

    def _entries(self, folder: Path) -> list[Path]:
        try:
            return sorted(folder / name for name in os.listdir(folder))
        except OSError as error:
            raise _unreadable(error) from error

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(LeftOut(path.relative_to(self.source).as_posix(), reason))


def _unwanted(name: str) -> str | None:
    """Why a file or folder of this name is not wanted."""
    if name.startswith('.'):
        return 'hidden'
    return 'a backup copy' if name.lower().endswith(_BACKUPS) else None


def _listed(path: Path) -> dict[str, list[Path]]:
    """``{domain: [file, ...]}``, the files absolute or relative to the list's folder."""
    try:
        # JSON is YAML too. OmegaConf's loader refuses a key that is there twice, where YAML's own takes the last.
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f'--source: {path} cannot be read: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict) or not all(
        isinstance(files, list) and all(isinstance(file, str) for file in files) for files in content.values()
    ):
        raise ValueError(f'--source: {path} is no list of files; it must hold {{domain: [file, ...], ...}}')
    found = {}
    for name, files in content.items():
        for file in files:
            if suffix_of(file) is None:
                raise ValueError(f'--source: {path}: {file} is not one of {PATTERNS}')
        found[str(name)] = [path.parent / Path(file).expanduser() for file in files]
        if len({file.resolve() for file in found[str(name)]}) < len(files):
            raise ValueError(f'--source: {path} lists a file of {name!r} twice')
        for file in found[str(name)]:
            if file.exists() and not file.is_file():
                raise ValueError(f'--source: {path}: {file} is no regular file')
    return found


def _source(folder: Path, paths: Mapping[str, list[Path]], left_out: list[LeftOut]) -> Source:
    name_of: dict[str, str] = {}
    files: list[SourceFile] = []
    for name, found in paths.items():
        if name in ('', '.', '..', 'index.json') or '/' in name or not name.isprintable():
            raise ValueError(f'--source: a domain of {folder} is called {name!r}, no name for a folder; rename it')
        domain = ALIASES.get(name, name)
        if domain in name_of:
            raise ValueError(f'--source: {name_of[domain]} and {name} in {folder} are both domain {domain}; merge them')
        name_of[domain] = name
        listed = [_listed_file(domain, path, folder) for path in found]
        if not any(file.bytes for file in listed):
            there = [one for one in left_out if one.path == name or one.path.startswith(f'{name}/')]
            names = ', '.join(f'{one.path} ({one.reason})' for one in there[:3]) + (', ...' if len(there) > 3 else '')
            raise ValueError(
                f'--source: domain {folder / name} is empty: no data in {PATTERNS} files'
                f'{f"; left out: {names}" if there else ""}; add them or leave the domain out'
            )
        files += listed
    _check_end_marks(folder, files)
    return Source(folder, sorted(files, key=lambda file: (file.domain, file.path)), left_out)


def _listed_file(domain: str, path: Path, folder: Path) -> SourceFile:
    try:
        with open(path, 'rb'):
            status = path.stat()
    except OSError as error:
        raise _unreadable(error) from error
    name = path.relative_to(folder) if path.is_relative_to(folder) else path
    return SourceFile(domain, name.as_posix(), status.st_size, status.st_mtime_ns)


def _check_end_marks(folder: Path, files: list[SourceFile]) -> None:
    """Raise a ValueError that names the files whose format has an end mark and that lack it."""
    cut = [file.path for file in files if not _ends_with(folder / file.path, END_MARKS.get(suffix_of(file.path) or ''))]
    if cut:
        more = f' and {len(cut) - 5} more' if len(cut) > 5 else ''
        raise ValueError(
            f'--source: cut off, without their end mark: {", ".join(cut[:5])}{more} in {folder}; fetch them again or '
            'remove them'
        )


def _ends_with(path: Path, mark: bytes | None) -> bool:
    if mark is None or path.stat().st_size < len(mark):
        return mark is None
    with open(path, 'rb') as file:
        file.seek(-len(mark), os.SEEK_END)
        return file.read() == mark


def _unreadable(error: OSError) -> ValueError:
    return ValueError(f'--source: cannot read {error.filename}: {error.strerror}')
