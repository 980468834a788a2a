"""What a training config may name and set, read from the source of what will be built.

Importing composer and llm-foundry takes half a minute; their source files are parsed instead. So a misspelt key is
named immediately, for whatever version is installed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_WITHOUT_ARGUMENTS = ('ABC', 'abc.ABC', 'object')


@dataclass(frozen=True)
class Parameter:
    """One argument of a function or class."""

    annotation: str
    """Source of the type annotation; ``Any`` where there is none."""
    required: bool
    none_by_default: bool = False


@dataclass(frozen=True)
class Signature:
    """Arguments by name, in order; ``open`` if others are taken too (``**kwargs``)."""

    parameters: dict[str, Parameter]
    open: bool

    @classmethod
    def of(cls, annotations: Mapping[str, str]) -> Signature:
        """These arguments and no others; ``annotations`` is argument to source of its type."""
        return cls({name: Parameter(text, required=False) for name, text in annotations.items()}, open=False)


@cache
def registered(registry: str) -> dict[str, str]:
    """What foundry knows under a registry (``callbacks``): name to ``module:attribute``.

    Its own entries are ``<registry>.register('name', func=...)`` in its source, those of other packages entry points.
    """
    found: dict[str, str] = {}
    for module in (
        'algorithms',
        'callbacks',
        'data',
        'eval.datasets',
        'loggers',
        'metrics',
        'models',
        'optim',
        'tokenizers',
    ):
        name = f'llmfoundry.{module}'
        for node in _statements(name):
            call = node.value if isinstance(node, ast.Expr) else None
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and isinstance(call.func.value, ast.Name)
                and (call.func.value.id, call.func.attr) == (registry, 'register')
                and isinstance(call.args[0], ast.Constant)
            ):
                function = next(keyword.value for keyword in call.keywords if keyword.arg == 'func')
                found[str(call.args[0].value)] = f'{name}:{ast.unparse(function)}'
    for point in importlib.metadata.entry_points(group=f'llmfoundry_{registry}'):
        found[point.name] = point.value
    return found


@cache
def signature(target: str) -> Signature:
    """The arguments of ``module:attribute``, a class or a function; any at all where its source cannot be followed.

    A class without an ``__init__`` has that of its base or, as a dataclass, its fields. Keyword arguments that are
    passed on to a base class are those of the base.
    """
    module, _, attribute = target.partition(':')
    found = _definition(module, attribute)
    if found is None:
        return Signature({}, open=True)
    module, node = found
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return _of_function(node, bound=False)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
    own = _of_function(init, bound=True) if init else Signature({}, open=True)
    if not own.parameters and any('dataclass' in ast.unparse(decorator) for decorator in node.decorator_list):
        return Signature(_fields(node), open=False)
    if not own.open or (init and not _passes_on(init)):
        return own
    names = [ast.unparse(base) for base in node.bases]
    bases = [signature(f'{module}:{name}') for name in names if name not in _WITHOUT_ARGUMENTS]
    parameters = {name: parameter for base in bases for name, parameter in base.parameters.items()}
    return Signature(parameters | own.parameters, open=any(base.open for base in bases))


def _passes_on(init: ast.FunctionDef) -> bool:
    """Whether ``**kwargs`` of a constructor reach the base's."""
    return any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == '__init__'
        and any(keyword.arg is None and ast.unparse(keyword.value) == init.args.kwarg.arg for keyword in call.keywords)
        for call in ast.walk(init)
        if init.args.kwarg
    )


@cache
def _statements(module: str) -> list[ast.stmt]:
    """The statements of a module's source; none where there is no source."""
    path = _source(module)
    return ast.parse(path.read_text(encoding='utf-8')).body if path else []


@cache
def _source(module: str) -> Path | None:
    # Asking for the place of a submodule would import its package.
    top, *rest = module.split('.')
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder).joinpath(*rest)
        for file in (path / '__init__.py', path.with_suffix('.py')):
            if file.is_file():
                return file
    return None


def _definition(module: str, name: str, depth: int = 0) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    """The class or function that a module calls ``name``, followed through imports, and the module that defines it."""
    if depth > 10:
        return None
    for node in _statements(module):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_absolute(module, node), alias.name, depth + 1)
    if '.' in name:
        # An attribute of an imported module: ``torch.optim.AdamW``.
        package, _, attribute = name.rpartition('.')
        return _definition(package, attribute, depth + 1)
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ''
    path = _source(module)
    package = module.split('.') if path and path.name == '__init__.py' else module.split('.')[:-1]
    return '.'.join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults += arguments.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    parameters = {
        argument.arg: Parameter(
            ast.unparse(argument.annotation) if argument.annotation else 'Any',
            required=default is None,
            none_by_default=isinstance(default, ast.Constant) and default.value is None,
        )
        for argument, default in pairs[1 if bound else 0 :]
    }
    return Signature(parameters, open=arguments.kwarg is not None)


def _fields(node: ast.ClassDef) -> dict[str, Parameter]:
    return {
        field.target.id: Parameter(
            ast.unparse(field.annotation),
            required=field.value is None or ast.unparse(field.value) == 'MISSING',
            none_by_default=isinstance(field.value, ast.Constant) and field.value.value is None,
        )
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }
