"""A small corpus out of text that a Python installation has, in the layout of any other source.

The same installation gives the same corpus: modules and packages are taken in the order of their names.
"""

from __future__ import annotations

import ast
import email
import importlib.metadata
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from itt_composer.atomic import atomic_folder

# Enough for a tiny model's training, little enough to be made in seconds.
_DOMAIN_BYTES = 3 << 20
_LEAST_CHARACTERS = 200
# Tests, tables and generated text of the standard library.
_SKIPPED = {
    '__pycache__',
    'test',
    'tests',
    'encodings',
    'idlelib',
    'lib2to3',
    'pydoc_data',
    'site-packages',
    'dist-packages',
}


def write_corpus(folder: Path) -> None:
    """Write ``folder/<kind>/<kind>.jsonl`` for sources, docstrings and descriptions."""
    with atomic_folder(folder, own=lambda there: False) as partial:
        for kind, texts in (('sources', _sources()), ('docstrings', _docstrings()), ('descriptions', _descriptions())):
            (partial / kind).mkdir(parents=True)
            left = _DOMAIN_BYTES
            with open(partial / kind / f'{kind}.jsonl', 'w', encoding='utf-8') as file:
                for text in texts:
                    if left <= 0:
                        break
                    if len(text) >= _LEAST_CHARACTERS:
                        file.write(json.dumps({'text': text}) + '\n')
                        left -= len(text)


def _modules() -> list[Path]:
    found: list[Path] = []
    for parent, folders, names in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [Path(parent, name) for name in names if name.endswith('.py')]
    return sorted(found)


def _sources() -> Iterator[str]:
    for path in _modules()[::2]:
        yield path.read_text(encoding='utf-8', errors='replace')


def _docstrings() -> Iterator[str]:
    """One document for each module that is not among the sources, so that no text is in both."""
    for path in _modules()[1::2]:
        tree = ast.parse(path.read_bytes())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        parts = [(getattr(node, 'name', path.stem), ast.get_docstring(node)) for node in nodes]
        yield '\n\n'.join(f'{name}\n{text}' for name, text in parts if text)


def _descriptions() -> Iterator[str]:
    """What installed packages say of themselves."""
    found = (distribution.read_text('METADATA') for distribution in importlib.metadata.distributions())
    packages = {message['Name']: message for message in (email.message_from_string(text) for text in found if text)}
    for name in sorted(packages):
        yield f'{name}\n{packages[name]["Summary"]}\n\n{packages[name].get_payload()}'
