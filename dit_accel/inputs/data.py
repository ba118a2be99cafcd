"""JSON, strictly: no key twice, no NaN, not nested without end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from dit_accel.inputs.fields import shown
from dit_accel.inputs.text import read

DEEPEST = 64
_DEEP = f"not usable: nested more than {DEEPEST} deep"


def parse(text: str) -> Any:
    """The value of a JSON text; ValueError says where it is none."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}"
        where = f"line {error.lineno}, {where}" if "\n" in text else where
        raise ValueError(f"not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise ValueError(_DEEP) from None
    if _too_deep(text, value):
        raise ValueError(_DEEP)
    return value


def read_json(path: str | Path, what: str = "JSON file") -> Any:
    """The value of a JSON file; ValueError names the file."""
    text = read(path, what)
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{what} {path}: {error}") from None


def read_object(path: str | Path, what: str = "JSON file") -> dict[str, Any]:
    """The object of a JSON file; ValueError names the file."""
    value = read_json(path, what)
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} {path} holds {shown(value)}, not an object of keys and values")
    return dict(value)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} is there twice")
        found[key] = value
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no number")


def _too_deep(text: str, value: Any) -> bool:
    if text.count("[") + text.count("{") <= DEEPEST:
        return False
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in inner for y in x if isinstance(y, (dict, list))]
        depth += 1
    return bool(level)
