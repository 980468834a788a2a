"""Which packages a corpus is made of, their download, and the documents in them.

A package is read as a stream and never unpacked. apt-get is used with a package list of its own, so the sources that
are set on the machine do not matter, and nothing is installed.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from itt_composer.checks import check_file_name, check_keys, check_mapping


@dataclass(frozen=True)
class Recipe:
    """The packages of a corpus."""

    source: str
    """A line of apt's sources.list."""
    domains: dict[str, dict[str, list[str]]]
    """Domain to package to the patterns of its documents' paths."""

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a YAML file such as ``packages.yaml`` beside this module.

        Raises:
            ValueError: one line that names the key and what is wrong.
        """
        try:
            content = OmegaConf.to_container(OmegaConf.load(path))
        except (OSError, YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f'{path}: cannot be read: {" ".join(str(error).split())}') from error
        if not isinstance(content, dict):
            raise ValueError(f'{path}: expected the keys source and domains')
        check_keys(map(str, content), ('source', 'domains'), str(path))
        if not content.get('source') or not content.get('domains'):
            raise ValueError(f'{path}: source or domains is missing or empty; set both')
        check_mapping(f'{path}: domains', content['domains'])
        names: list[str] = []
        for domain, packages in content['domains'].items():
            check_file_name(f'{path}: domains', domain)
            check_mapping(f'{path}: domains.{domain}', packages)
            for package, patterns in (packages or {}).items():
                if not (isinstance(patterns, list) and patterns and all(isinstance(one, str) for one in patterns)):
                    raise ValueError(
                        f'{path}: domains.{domain}.{package}: expected a list of patterns, got {patterns!r}'
                    )
                names.append(package)
        if len(set(names)) < len(names):
            raise ValueError(f'{path}: a package is listed twice; list it in one domain')
        return cls(content['source'], content['domains'])


def download(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Download the packages into ``folder``; returns package to its ``.deb`` file.

    Raises:
        ValueError: apt-get is missing, or cannot get a package; the message names it.
    """
    folder = folder.absolute()
    names = [name for packages in recipe.domains.values() for name in packages]
    for name in ('lists/partial', 'cache/archives/partial', 'debs'):
        (folder / name).mkdir(parents=True)
    (folder / 'sources.list').write_text(recipe.source + '\n')
    options = {
        'Dir::Etc::SourceList': folder / 'sources.list',
        'Dir::Etc::SourceParts': '-',
        'Dir::State::Lists': folder / 'lists',
        'Dir::Cache': folder / 'cache',
        'Acquire::Languages': 'none',
        'APT::Sandbox::User': 'root',
    }
    command = ['apt-get', '-q', *(f'-o{key}={value}' for key, value in options.items())]
    _run([*command, '-oAPT::Update::Error-Mode=any', 'update'], folder)
    _run([*command, 'download', *names], folder / 'debs')
    return {name: next((folder / 'debs').glob(f'{name}_*.deb')) for name in names}


def _run(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise ValueError(f'{command[0]}: missing; run this on Debian or Ubuntu') from error
    if done.returncode:
        lines = [line.removeprefix('E: ') for line in done.stderr.splitlines() if line.startswith(('E:', 'dpkg-deb:'))]
        raise ValueError('; '.join(lines) or f'{command[0]} failed with exit code {done.returncode}')
    return done.stdout


def version(package: Path) -> str:
    """Return the version of a ``.deb`` file.

    Raises:
        ValueError: it is no Debian package.
    """
    return _run(['dpkg-deb', '--field', str(package), 'Version'], package.parent).strip()


def files(package: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield path and content of each file of a ``.deb`` file, and instead of a ``.tar.xz`` the files in it.

    Raises:
        ValueError: the package is damaged.
    """
    with subprocess.Popen(
        ['dpkg-deb', '--fsys-tarfile', str(package)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield from _members(process.stdout, 'r|')
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f'{package.name}: damaged: {error}') from error
        finally:
            process.kill()


def _members(stream: IO[bytes] | None, mode: str) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            if member.name.endswith('.tar.xz'):
                yield from _members(content, 'r|xz')
            else:
                yield member.name.removeprefix('./'), content


def is_document(path: str, patterns: Sequence[str]) -> bool:
    """Whether a file is one of the documents."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def licences(copyright_text: str) -> list[str]:
    """Return the licences that a machine-readable copyright file names; others, which are prose, name none."""
    if not copyright_text.startswith('Format:'):
        return []
    return sorted(set(re.findall(r'^License: *(\S.*?) *$', copyright_text, re.MULTILINE)))
