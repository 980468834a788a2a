"""The laboratory: one command, and a library that does not know it."""

from __future__ import annotations

import ast

import pytest
from conftest import REPO
from typer.testing import CliRunner

from research.__main__ import VERBS, app


def imported(file):
    """The modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ''


def test_the_library_does_not_import_the_laboratory():
    files = [file for folder in ('itt_composer', 'data_prep') for file in (REPO / folder).rglob('*.py')]
    found = {f'{file}: {name}' for file in files for name in imported(file) if name.split('.')[0] == 'research'}
    assert len(files) > 50 and not found


@pytest.mark.parametrize('verb', VERBS)
def test_each_verb_has_help_and_refuses_an_unknown_option(verb):
    shown = CliRunner().invoke(app, [*verb.split(), '--help'])
    assert shown.exit_code == 0 and f'python -m research {verb}' in shown.output
    assert CliRunner().invoke(app, [*verb.split(), '--no-such-option']).exit_code == 2
