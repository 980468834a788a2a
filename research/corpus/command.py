"""``python -m research corpus OUT``: a few hundred MB of plain text from Debian packages, for ``make data``.

OUT/source/<domain>/000.jsonl.zst   documents: text, package and path of each
OUT/licences/<package>.txt          the package's copyright file
OUT/manifest.json                   packages, versions, licences, counts
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Annotated, Any

import typer
import zstandard
from rich.console import Console
from rich.table import Table

from itt_composer.atomic import atomic_folder, write_json
from itt_composer.one_line import one_line_errors
from research.corpus.deduplicate import Deduplicator
from research.corpus.packages import Recipe, download, files, is_document, licences, version
from research.corpus.text import plain_text

PACKAGES = Path(__file__).parent / 'packages.yaml'
FILE_BYTES = 32 << 20
"""Of text in one file, before compression."""
console = Console(soft_wrap=True, highlight=False)


class DomainWriter:
    """Writes the documents of a domain into files of at most about ``FILE_BYTES`` of text."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.files, self.left = folder, 0, 0
        self._file: IO[bytes] | None = None

    def write(self, document: Mapping[str, str]) -> None:
        """Append one document."""
        line = (json.dumps(document, ensure_ascii=False) + '\n').encode()
        if self.left < len(line) or self._file is None:
            self.close()
            path = self.folder / f'{self.files:03d}.jsonl.zst'
            self._file = zstandard.ZstdCompressor(level=9).stream_writer(open(path, 'wb'))  # noqa: SIM115
            self.files, self.left = self.files + 1, FILE_BYTES
        self._file.write(line)
        self.left -= len(line)

    def close(self) -> None:
        """End the current file."""
        if self._file is not None:
            self._file.close()


def write_corpus(recipe: Recipe, packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the corpus into the empty folder ``out``; returns its manifest.

    Args:
        recipe: domains, packages and patterns.
        packages: name to ``.deb`` file.
        out: the folder.

    Raises:
        ValueError: a package is damaged, has no copyright file, or has no file that matches a pattern.
    """
    deduplicator, entries = Deduplicator(), {}
    (out / 'licences').mkdir()
    for domain, of_domain in recipe.domains.items():
        writer = DomainWriter(out / 'source' / domain)
        for name, patterns in of_domain.items():
            entries[name] = {
                'domain': domain,
                'version': version(packages[name]),
                **_write_package(name, packages[name], patterns, deduplicator, writer, out / 'licences'),
            }
        writer.close()
    domains = {
        domain: {key: sum(entries[name][key] for name in of_domain) for key in ('documents', 'bytes')}
        for domain, of_domain in recipe.domains.items()
    }
    manifest = {'source': recipe.source, 'domains': domains, 'packages': entries}
    write_json(manifest, out / 'manifest.json')
    return manifest


def _write_package(
    name: str, package: Path, patterns: list[str], deduplicator: Deduplicator, writer: DomainWriter, licence: Path
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    matched: set[str] = set()
    named: list[str] | None = None
    for path, content in files(package):
        if path == f'usr/share/doc/{name}/copyright':
            terms = content.read().decode(errors='replace')
            (licence / f'{name}.txt').write_text(terms)
            named = licences(terms)
        matching = [pattern for pattern in patterns if is_document(path, [pattern])]
        if not matching:
            continue
        matched.update(matching)
        text = plain_text(path, content.read())
        new = None if text is None else deduplicator.new_text(text)
        counts['files'] += 1
        counts['not_utf8'] += text is None
        counts['bytes_before'] += len((text or '').encode())
        if new is not None:
            counts['documents'] += 1
            counts['bytes'] += len(new.encode())
            writer.write({'text': new, 'package': name, 'path': path})
    if named is None:
        raise ValueError(f'{name}: no copyright file in {package.name}; take another package')
    if missing := [pattern for pattern in patterns if pattern not in matched]:
        raise ValueError(f'{name}: no file of {package.name} matches {missing[0]}; correct the pattern')
    keys = ('files', 'documents', 'not_utf8', 'bytes_before', 'bytes')
    return {'licences': named, 'copyright': f'licences/{name}.txt', **{key: counts[key] for key in keys}}


def main(
    out: Annotated[Path, typer.Argument(help='Folder of the corpus; missing or empty.')],
    packages: Annotated[Path, typer.Option(help='YAML file with the packages.')] = PACKAGES,
) -> None:
    """Download the packages, and write their documents without duplicates."""
    started = time.monotonic()
    with one_line_errors('corpus'):
        recipe = Recipe.read(packages)
        with atomic_folder(out, own=lambda there: False) as partial, tempfile.TemporaryDirectory() as scratch:
            debs = download(recipe, Path(scratch))
            console.print(f'{len(debs)} packages, {time.monotonic() - started:.0f} s')
            manifest = write_corpus(recipe, debs, partial)
    table = Table(title=f'{out}, {time.monotonic() - started:.0f} s', title_justify='left')
    for column in ('domain', 'documents', 'MB', 'MB with duplicates'):
        table.add_column(column, justify='left' if column == 'domain' else 'right')
    for domain, counts in manifest['domains'].items():
        before = sum(one['bytes_before'] for one in manifest['packages'].values() if one['domain'] == domain)
        table.add_row(domain, f'{counts["documents"]:,}', f'{counts["bytes"] / 1e6:.1f}', f'{before / 1e6:.1f}')
    console.print(table)
