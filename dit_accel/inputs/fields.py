"""Values from outside, held against what a dataclass says of its fields.

One place for command line, page, job files, presets and generation.json: a value is of its field's
type, a number is finite, a text can be written.
"""

from __future__ import annotations

import math
import reprlib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def shown(value: object) -> str:
    """A value as an error shows it: never longer than a line."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to show"


def check(record: object) -> None:
    """ValueError for the first field of a dataclass that is not what its annotation says."""
    kind: type = type(record)
    for name, hint in _hints(kind).items():
        expect(name, getattr(record, name), hint)


def expect(name: str, value: object, hint: object) -> None:
    """ValueError, with what was expected and what came, unless `value` is of type `hint`."""
    if not _fits(value, hint):
        finite = isinstance(value, float) and not math.isfinite(value)
        words = _words(hint).replace("a number", "a finite number") if finite else _words(hint)
        raise ValueError(f"{name} is {words}, not {shown(value)}")


def within(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low ≤ value ≤ high."""
    if not low <= value <= high:
        raise ValueError(f"{name} lies from {low} to {high}, not {shown(value)}")


def build(cls: type, values: Any, where: str = "") -> Any:
    """A dataclass from a mapping of its fields; ValueError names `where` and the key."""
    head = f"{where}: " if where else ""
    if not isinstance(values, Mapping):
        raise ValueError(f"{head}an object of keys and values was expected, not {shown(values)}")
    known = {f.name for f in fields(cls) if f.init}
    unknown = sorted(shown(key) for key in values if key not in known)
    if unknown:
        raise ValueError(
            f"{head}{cls.__name__} has no option {', '.join(unknown)}: "
            f"it takes {', '.join(sorted(known))}"
        )
    needed = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
    if needed - set(values):
        raise ValueError(f"{head}{cls.__name__} needs {', '.join(sorted(needed - set(values)))}")
    try:
        for name, value in values.items():
            expect(name, value, _hints(cls)[name])
        return cls(**{k: _frozen(v) for k, v in values.items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{head}{error}") from None


@lru_cache(maxsize=256)
def _hints(cls: type) -> dict[str, object]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _fits(value: object, hint: object) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return value in args
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and _fit_each(value, args)
    if hint in _PLAIN:
        return _PLAIN[hint](value)
    if isinstance(hint, type) and hint is not Any and origin is None:
        return isinstance(value, hint)
    return True


def _fit_each(values: Any, hints: tuple[Any, ...]) -> bool:
    if not hints:
        return True
    if hints[-1] is Ellipsis or len(hints) == 1:
        return all(_fits(value, hints[0]) for value in values)
    return len(values) == len(hints) and all(map(_fits, values, hints))


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _text(value: object) -> bool:
    """Half a character (a lone surrogate) can be written to no file; a path may stand for text."""
    if not isinstance(value, str):
        return isinstance(value, PathLike)
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_PLAIN = {
    int: _whole,
    float: _number,
    str: _text,
    bool: lambda value: isinstance(value, bool),
    type(None): lambda value: value is None,
}


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(one) for one in args if one is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (tuple, list):
        return _list_words(args)
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")


def _list_words(hints: tuple[Any, ...]) -> str:
    if not hints:
        return "a list"
    if hints[-1] is Ellipsis or len(hints) == 1:
        each = _words(hints[0]).removeprefix("a ")
        return f"a list of {each}s" if hints[0] in (int, float, str) else f"a list, each {each}"
    return f"a list [{', '.join(map(_words, hints))}]"
