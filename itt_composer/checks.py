"""Checks of values from outside, each a ValueError of one line that names the key. Standard library only."""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar('T')
# A resumed run reads another clock, so that seconds are left out.
TIME_UNITS = ('ba', 'sp', 'tok', 'ep', 'dur')
LONGEST = 10**15  # In any unit: more tokens than any training has read.


def check_choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise a ValueError that lists the allowed values, and the nearest one, if ``value`` is not among them."""
    if isinstance(value, str) and value in allowed:
        return
    raise ValueError(f'{key}: {value!r} is not one of {", ".join(allowed)}{did_you_mean(value, allowed)}')


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise a ValueError that names the first unknown key and the nearest known one."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            raise ValueError(f'{where}: unknown key {key!r}{did_you_mean(key, known)}')


def check_mapping(key: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a mapping, or None."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f'{key}: {value!r} is not a mapping of keys to values')


def check_file_name(key: str, value: str) -> None:
    """Raise a ValueError unless ``value`` can be the name of a folder directly in another."""
    if not is_file_name(value):
        raise ValueError(f'{key}: expected a name without path parts and line breaks, got {value!r}; set another')


def is_file_name(value: Any) -> bool:
    """Whether ``value`` names a file directly in a folder, and nothing above or below it."""
    return (
        isinstance(value, str) and value.isprintable() and value not in ('', '.', '..') and not set(value) & set('/\\')
    )


def check_value(
    key: str,
    value: Any,
    annotation: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
) -> None:
    """Raise a ValueError unless a value is what a type annotation says, and its numbers are within the limits.

    Booleans are not numbers, and numbers are finite. What the annotation says of other classes than Python's own is not
    checked.

    Args:
        key: what the message names as the place.
        value: from YAML: None, a boolean, a number, text, a list or a mapping.
        annotation: such as ``int | None`` or ``Optional[Union[str, list[float]]]``.
        minimum: the smallest allowed number, also within a list.
        above: the number that the value must exceed.
        maximum: the largest allowed number.
        below: the number that the value must not reach.
        choices: the allowed texts, in place of the annotation.
        units: what a text ends in, after a number.
    """
    if choices:
        return check_choice(key, value, choices)
    fits = _fits(value, _parsed(annotation))
    numbers = [v for v in (value if _is_list(value) else [value]) if _is_number(v)]
    if units and isinstance(value, str):
        text = re.fullmatch(rf'(\d+(?:\.\d+)?) *(?:{"|".join(units)})?', value.lower())
        fits, numbers = text is not None, [float(text[1])] if text else []
    if fits and all(
        (minimum is None or v >= minimum)
        and (above is None or v > above)
        and (maximum is None or v <= maximum)
        and (below is None or v < below)
        for v in numbers
    ):
        return
    bounds = (('at least', minimum), ('above', above), ('at most', maximum), ('below', below))
    limits = ' and '.join(f'{words} {bound:g}' for words, bound in bounds if bound is not None)
    limits += f', with a unit of {", ".join(units)}' if units else ''
    raise ValueError(
        f'{key}: expected {_words(_parsed(annotation))}{f" ({limits})" if limits else ""}, got {_shortened(value)}'
    )


def check_time(key: str, value: Any, units: Sequence[str] = TIME_UNITS, zero: bool = False) -> None:
    """Raise a ValueError unless a value is a positive time of the trainer, such as ``500ba`` or ``0.05dur``.

    Args:
        key: what the message names as the place.
        value: a number and a unit.
        units: those that are allowed.
        zero: whether a length of zero is allowed.
    """
    match = re.fullmatch(r'(.+?)(iter|ep|ba|sp|tok|dur|sec)', value) if isinstance(value, str) else None
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        problem = 'expected a number and a unit'
    elif match[2] not in units:
        problem = f'expected one of the units {", ".join(units)}'
    elif number < 0 or (number == 0 and not zero):
        problem = 'expected a positive time'
    elif number > LONGEST:
        problem = f'expected at most {LONGEST:.0e}'
    elif match[2] != 'dur' and number != int(number):
        problem = f'expected a whole number of {match[2]}'
    elif match[2] == 'dur' and number > 1:
        problem = 'expected at most the whole training, 1dur'
    else:
        return
    raise ValueError(
        f"{key}: {problem}, got {value!r}; write '500ba' (batches), '10000sp' (samples), '1e9tok' (tokens), '2ep' "
        "(epochs) or '0.05dur' (fraction of the training)"
    )


def did_you_mean(value: Any, known: Sequence[str]) -> str:
    """``'; did you mean ...?'`` with the nearest known name, or an empty string where none is near."""
    nearest = difflib.get_close_matches(str(value), known, n=1)
    return f'; did you mean {nearest[0]!r}?' if nearest else ''


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of JSON, or None if there is no file.

    Raises:
        ValueError: something else is in the file, or it is incomplete.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path}: not a JSON file ({error})') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected a JSON object, got {type(content).__name__}')
    return content


def json_lines(file: Path, read: Callable[[dict[str, Any]], T]) -> Iterator[tuple[int, T]]:
    """What ``read`` makes of each line of JSON, after the line's number; empty lines are skipped.

    Raises:
        ValueError: one line with the file and the number of a line that is no object, or that ``read`` refuses.
    """
    with file.open('rb') as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                result = read(_json_object(line))
            except Exception as error:  # The function may be a user's.
                raise ValueError(f'{file}:{number}: {" ".join(str(error).split())}') from None
            yield number, result


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f'not JSON ({error})') from None
    if not isinstance(row, dict):
        raise ValueError(f'expected a JSON object, got {type(row).__name__}')
    return row


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    # A whole number may be larger than any float.
    return _is_number(value) and (isinstance(value, Integral) or math.isfinite(value))


# Name in an annotation to test, words in the singular, and words in a list.
_SIMPLE: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    'None': (lambda v: v is None, 'null', 'nulls'),
    'bool': (lambda v: isinstance(v, bool), 'true or false', 'booleans'),
    'int': (lambda v: _is_number(v) and isinstance(v, Integral), 'a whole number', 'whole numbers'),
    'float': (_is_finite, 'a finite number', 'finite numbers'),
    'str': (lambda v: isinstance(v, str), 'text', 'texts'),
    'Path': (lambda v: isinstance(v, str), 'a path', 'paths'),
}
_LISTS = ('list', 'List', 'tuple', 'Tuple', 'Sequence', 'Iterable', 'Collection', 'set', 'Set')
_MAPPINGS = ('dict', 'Dict', 'Mapping', 'MutableMapping')


@cache
def _parsed(annotation: str) -> ast.expr:
    return ast.parse(annotation, mode='eval').body


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ''


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """The members of a union, or the annotation alone."""
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _alternatives(_parsed(node.value))
    if isinstance(node, ast.Subscript) and _name(node.value) in ('Union', 'Optional'):
        members = [member for argument in _arguments(node) for member in _alternatives(argument)]
        return [*members, ast.Constant(None)] if _name(node.value) == 'Optional' else members
    return [node]


def _arguments(node: ast.Subscript) -> list[ast.expr]:
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _fits(value: Any, node: ast.expr) -> bool:
    return any(_fits_one(value, member) for member in _alternatives(node))


def _fits_one(value: Any, node: ast.expr) -> bool:
    outer, arguments = (node.value, _arguments(node)) if isinstance(node, ast.Subscript) else (node, [])
    name = _name(outer)
    if name in _SIMPLE:
        return _SIMPLE[name][0](value)
    if name == 'Literal':
        return any(type(value) is type(a.value) and value == a.value for a in arguments if isinstance(a, ast.Constant))
    if name in _MAPPINGS:
        return isinstance(value, Mapping)
    if name in _LISTS:
        if not _is_list(value):
            return False
        fixed = name in ('tuple', 'Tuple') and arguments and _name(arguments[-1]) != 'Ellipsis'
        if fixed:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return all(_fits(v, arguments[0]) for v in value) if arguments else True
    return True


def _words(node: ast.expr) -> str:
    """What an annotation asks for: ``a whole number or null``."""
    return ' or '.join(dict.fromkeys(_words_of_one(member) for member in _alternatives(node)))


def _words_of_one(node: ast.expr) -> str:
    outer, arguments = (node.value, _arguments(node)) if isinstance(node, ast.Subscript) else (node, [])
    name = _name(outer)
    if name in _SIMPLE:
        return _SIMPLE[name][1]
    if name == 'Literal':
        return ' or '.join(_name(a) for a in arguments)
    if name in _MAPPINGS:
        return 'a mapping'
    if name in _LISTS:
        members = [words for a in (_alternatives(arguments[0]) if arguments else []) if (words := _plural(a))]
        count = f'{len(arguments)} ' if name in ('tuple', 'Tuple') and len(arguments) > 1 else ''
        return f'a list of {count}{" or ".join(members)}' if members else 'a list'
    return name or 'another value'


def _plural(node: ast.expr) -> str:
    """The words for several values in a list; empty for classes that are not checked."""
    if isinstance(node, ast.Subscript) and _name(node.value) in _LISTS:
        return _words_of_one(node).replace('a list', 'lists', 1)
    return _SIMPLE[_name(node)][2] if _name(node) in _SIMPLE else ''


def _shortened(value: Any) -> str:
    text = 'null' if value is None else repr(value)
    return text if len(text) <= 100 else f'{text[:97]}...'
