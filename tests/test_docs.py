"""The README and the docs: commands, options, files, links and code that they name exist. Nothing heavy is run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from itt_composer.cli import app
from itt_composer.config.run_file import resolve_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')),
    *sorted((ROOT / 'docs').glob('*.md')),
    *sorted((ROOT / 'research').rglob('README.md')),
    *sorted((ROOT / 'itt_composer').rglob('README.md')),
]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.M | re.S)
INLINE = re.compile(r'`([^`\n]+)`')
LINK = re.compile(r'\]\(([^)\s]+)\)')
PROGRAMS = ('itt', 'make', 'python', 'composer')
FOLDERS = ('benchmarks', 'data_prep', 'docs', 'itt_composer', 'research', 'tests', 'yamls')

# What a tiny config takes from the tokenizer of the data.
OF_DATA = ('model.vocab_size=4096', 'model.bos_token_id=1', 'model.eos_token_id=2')

every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a ``bash`` block or in inline code."""
    text = page.read_text()
    lines = [line for language, block in FENCE.findall(text) if language == 'bash' for line in one_line_each(block)]
    lines += [code for code in INLINE.findall(FENCE.sub('', text)) if ' ' in code and '...' not in code]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words and words[0] in PROGRAMS:
            yield words


def one_line_each(block: str) -> list[str]:
    return [] if block.startswith('#!') else block.replace('\\\n', ' ').splitlines()


@every_page
def test_itt_commands_have_these_options(page: Path) -> None:
    group = typer.main.get_command(app)
    for words in commands(page):
        if words[0] != 'itt' or words[1].startswith('-'):
            continue
        command = group.get_command(None, words[1])
        assert command is not None, words
        options = {name for parameter in command.params for name in parameter.opts}
        given = {word.split('=')[0] for word in words[2:] if re.match(r'--?[a-z]', word)}
        assert given <= options | {'--help'}, words


@every_page
def test_training_commands_resolve(page: Path, tmp_path: Path) -> None:
    # Stands for the pretrained models of the pages.
    (tmp_path / 'config.json').write_text('{"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 64}')
    for words in commands(page):
        before = 'train.py' if 'train.py' in words else words[1]
        if before in ('train.py', 'train', 'validate', 'flops') and words[-1] != before:
            name, *rest = words[words.index(before) + 1 :]
            overrides = [word for word in rest if re.match(r'[a-z_.]+=', word)]
            if '-' not in name:  # `itt train --verbose` in a sentence
                more = [f'model.pretrained={tmp_path}'] if name.startswith('sft/') else OF_DATA
                resolve_model(ROOT / name if name.endswith('.yaml') else name, [*overrides, *more])


@every_page
def test_make_targets_and_variables_exist(page: Path) -> None:
    makefile = (ROOT / 'Makefile').read_text()
    for words in commands(page):
        if words[0] != 'make':
            continue
        targets = [word for word in words[1:] if '=' not in word]
        assert targets, words
        for target in targets:
            assert re.search(rf'^([\w -]+ )?{target}( [\w -]+)?:', makefile, re.M), words
        known = re.findall(rf'^VARIABLES\.{targets[0]} :?= (.*)', makefile, re.M)
        assert {word.split('=')[0] for word in words[1:] if '=' in word} <= set(' '.join(known).split()), words


@every_page
def test_modules_and_files_exist(page: Path) -> None:
    for words in commands(page):
        if words[:2] == ['python', '-m']:
            assert importlib.util.find_spec(words[2]), words
    text = page.read_text()
    code = [*INLINE.findall(FENCE.sub('', text)), *(block for language, block in FENCE.findall(text) if language)]
    names = [name for piece in code for name in re.findall(rf'(?<![\w/.])(?:{"|".join(FOLDERS)})/[\w./*-]+', piece)]
    scripts = [word for words in commands(page) for word in words if re.fullmatch(r'[\w/]+\.(py|yaml)', word)]
    for name in [*names, *scripts]:
        assert any(ROOT.glob(name.rstrip('./'))), name


@every_page
def test_python_compiles_and_its_imports_resolve(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text()):
        if language != 'python':
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith('itt_composer'):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
            elif isinstance(node, ast.ImportFrom):
                assert importlib.util.find_spec(str(node.module)), ast.unparse(node)
            elif isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(name.name) for name in node.names), ast.unparse(node)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub('', page.read_text())):
        if '://' in link:
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r'^#+ (.*)', target.read_text(), re.M)
            assert anchor in [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings], link
