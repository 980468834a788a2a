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
from research.__main__ import VERBS
from research.study.study_file import load_study

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


def shown_configs(page: Path) -> dict[str, str]:
    """The training configs that the page shows, by the file name in their first line."""
    blocks = [block for language, block in FENCE.findall(page.read_text()) if language == 'yaml']
    return {block.split()[1]: block for block in blocks if block.startswith('# ')}


def one_line_each(block: str) -> list[str]:
    return [] if block.startswith('#!') else block.replace('\\\n', ' ').splitlines()


@every_page
def test_itt_commands_have_these_options(page: Path) -> None:
    group = typer.main.get_command(app)
    for words in commands(page):
        if words[0] == 'itt' and not words[1].startswith('-'):
            command = group.get_command(None, words[1])
            assert command is not None, words
            assert given(words[2:]) <= {name for parameter in command.params for name in parameter.opts}, words


def given(words: list[str]) -> set[str]:
    return {word.split('=')[0] for word in words if re.match(r'--?[a-z]', word)} - {'--help'}


@every_page
def test_research_commands_have_these_options(page: Path) -> None:
    for words in commands(page):
        if words[:3] != ['python', '-m', 'research'] or words[3:] == ['--help']:
            continue
        verb, *rest = [' '.join(words[3:5]), *words[5:]] if ' '.join(words[3:5]) in VERBS else words[3:]
        # The source is parsed and not imported, which would take seconds.
        tree = ast.parse((ROOT / VERBS[verb][0].replace('.', '/')).with_suffix('.py').read_text())
        main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == 'main')
        assert given(rest) <= {f'--{argument.arg}'.replace('_', '-') for argument in main.args.args}, words
        if verb in ('study', 'report'):
            load_study(rest[0], [word for word in rest[1:] if re.match(r'[\w.]+=', word)])


@every_page
def test_training_commands_resolve(page: Path, tmp_path: Path) -> None:
    # Stands for the pretrained models of the pages.
    (tmp_path / 'config.json').write_text('{"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 64}')
    shown = {name: tmp_path / name for name in shown_configs(page)}
    for name, block in shown_configs(page).items():
        shown[name].write_text(block)
    for words in commands(page):
        before = 'train.py' if 'train.py' in words else words[1]
        if before in ('train.py', 'train', 'validate', 'flops') and words[-1] != before:
            name, *rest = words[words.index(before) + 1 :]
            overrides = [word for word in rest if re.match(r'[a-z_.]+=', word)]
            if '-' not in name:  # `itt train --verbose` in a sentence
                more = [f'model.pretrained={tmp_path}'] if name.startswith('sft/') or name in shown else OF_DATA
                file = shown.get(name) or (ROOT / name if name.endswith('.yaml') else name)
                resolve_model(file, [*overrides, *more])


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
        assert name in shown_configs(page) or any(ROOT.glob(name.rstrip('./'))), name


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


def test_every_table_figure_and_appendix_of_the_paper_has_its_row(shared: Path) -> None:
    paper = (shared / 'paper' / 'inner_thinking_transformer.md').read_text()
    items = re.findall(r'^((?:Table|Figure) \d+)(?=: )|^(A\.\d)(?= [A-Z])', paper, re.M)
    page = (ROOT / 'docs' / 'paper.md').read_text()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in page.splitlines() if line.startswith('| ')][1:]
    assert sorted(row[0] for row in rows) == sorted({table or appendix for table, appendix in items})
    sections = ' '.join(re.findall(r'^## (.*)', page, re.M))
    for item, how, ran in rows:
        if how == 'see below':
            assert item in sections, item
        elif not how.startswith('not covered: '):
            assert '`' in how or re.match(r'Tables? \d', how), item
            assert ran or item == 'A.4', item
