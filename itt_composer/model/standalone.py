"""One self-contained modelling file, made from the package's own modules.

Hugging Face's ``trust_remote_code`` loads a single file that may import installed packages only. Here the modules that
``ITTForCausalLM`` needs are put one after another, each after those it imports; what they import from one another is
then in reach by its own name. The text is edited where it must be and otherwise kept, comments included.

The Triton kernels stay out of it: the file asks for this package's where it can have a use for them, and does without
where the package is not installed.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = 'itt_composer'
ROOT = 'itt_composer.model.causal_lm'
KERNELS = 'itt_composer.kernels'
HEADER = """\
# Inner Thinking Transformer (arXiv 2502.13842).
# Generated from the modules of itt_composer when the model was exported; change those, not this file.
"""


@dataclass
class _Module:
    name: str
    source: bytes
    tree: ast.Module
    names: dict[str, str] = field(default_factory=dict)
    """Package modules that this one refers to by a name of its own: ``routing`` to ``itt_composer.model.routing``."""
    needs: list[str] = field(default_factory=list)
    """Package modules that must stand before this one."""
    later: list[str] = field(default_factory=list)
    """Package modules imported inside functions, which may stand anywhere."""


def modeling_source(root: str = ROOT) -> str:
    """The source of one module that defines what ``root`` defines, and imports nothing of this package.

    Raises:
        ValueError: two modules define the same name, one imports it from elsewhere, or a function hides one that it
            uses; the file would be wrong.
    """
    modules = _collect(root)
    owner: dict[str, str] = {}
    for module in modules:
        for name in _defined(module.tree):
            if name in owner:
                raise ValueError(f'{name} is defined in {owner[name]} and in {module.name}; one file cannot hold both')
            owner[name] = module.name
    for module in modules:
        for name in _imported(module.tree):
            if name in owner:
                raise ValueError(
                    f'{name} is defined in {owner[name]} and imported in {module.name}; one file cannot hold both'
                )
    bodies = [_body(module, set(owner)) for module in modules]
    return '\n'.join([HEADER, _imports(modules), *bodies])


def _collect(root: str) -> list[_Module]:
    """``root`` and all package modules it needs, each after those that it needs itself."""
    ordered: dict[str, _Module] = {}

    def visit(name: str) -> None:
        if name in ordered:
            return
        module = _read(name)
        for needed in module.needs:
            visit(needed)
        ordered[name] = module
        for needed in module.later:
            visit(needed)

    visit(root)
    return list(ordered.values())


def _read(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    source = Path(spec.origin).read_bytes()
    module = _Module(name, source, ast.parse(source))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import) and any(alias.name.split('.')[0] == PACKAGE for alias in node.names):
            raise ValueError(f'{name}: write "from {PACKAGE} import ...", so that the export can follow it')
        if not _is_package_import(node):
            continue
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        imported = module.needs if node in module.tree.body else module.later
        for alias in node.names:
            if _is_module(f'{node.module}.{alias.name}'):
                imported.append(f'{node.module}.{alias.name}')
                module.names[alias.asname or alias.name] = f'{node.module}.{alias.name}'
            elif alias.asname not in (None, alias.name):
                raise ValueError(f'{name}: {alias.name} is imported under another name, which one file cannot hold')
            else:
                imported.append(node.module)
    return module


def _is_package_import(node: ast.AST) -> bool:
    """Whether this imports from the package, the kernels aside."""
    if not isinstance(node, ast.ImportFrom) or (node.module or '').split('.')[0] != PACKAGE:
        return False
    return all(f'{node.module}.{alias.name}' != KERNELS for alias in node.names)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a plain module, and so this is a name in it
        return False


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name) and target.id != '__all__')


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not _is_package_import(node):
            yield from ((alias.asname or alias.name).split('.')[0] for alias in node.names)


def _imports(modules: list[_Module]) -> str:
    """What the modules import from elsewhere, each name once."""
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    for node in (node for module in modules for node in module.tree.body):
        if isinstance(node, ast.Import):
            plain.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and not _is_package_import(node) and node.module != '__future__':
            names.setdefault(node.module or '', set()).update(ast.unparse(alias) for alias in node.names)
    lines = ['from __future__ import annotations', '', *sorted(plain)]
    return '\n'.join(
        [*lines, *(f'from {module} import {", ".join(sorted(names[module]))}' for module in sorted(names))]
    )


def _body(module: _Module, defined: set[str]) -> str:
    """The module's text without its imports, and with plain names for what it takes from modules in ``defined``."""
    edits: list[tuple[int, int, str]] = []
    lines = [0]
    for line in module.source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset

    for node in module.tree.body:
        exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__'
        if exports or isinstance(node, (ast.Import, ast.ImportFrom)):
            edits.append((*span(node), ''))
    for inner in ast.walk(module.tree):
        if isinstance(inner, ast.ImportFrom) and _is_package_import(inner) and inner not in module.tree.body:
            edits.append((*span(inner), 'pass'))
    for hidden, reference in _references(module):
        name = reference.attr
        if name in hidden or name not in defined:
            reason = 'is also a name in this function' if name in hidden else 'is defined in no module'
            raise ValueError(f'{module.name}, line {reference.lineno}: {name} {reason}')
        edits.append((*span(reference), name))

    text = module.source
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new.encode() + text[end:]
    doc = ast.get_docstring(module.tree)
    comment = ''.join(f'# {line}'.rstrip() + '\n' for line in (f'{module.name}', '', *(doc or '').splitlines()))
    body = text.decode()
    if doc is not None:
        start, end = span(module.tree.body[0])
        body = (text[:start] + text[end:]).decode()
    return f'\n\n{"# " + "-" * 100}\n{comment}\n\n{body.strip()}\n'


def _references(module: _Module) -> Iterator[tuple[set[str], ast.Attribute]]:
    """``routing.top_k`` and the like, each with the names that the functions around it bind."""

    def visit(node: ast.AST, bound: set[str]) -> Iterator[tuple[set[str], ast.Attribute]]:
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            bound = bound | {child.arg for child in ast.walk(node.args) if isinstance(child, ast.arg)}
            bound |= {
                child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)
            }
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in module.names:
            yield bound, node
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, bound)

    yield from visit(module.tree, set())
