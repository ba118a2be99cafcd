"""Objects that a text names, such as "sub(8)" or "window(t=3,h=8,w=8)": selectors and branches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from dit_accel.inputs.fields import check

T = TypeVar("T", bound="Named")


@dataclass(frozen=True)
class Named:
    """A frozen dataclass whose text, its name and what differs from the defaults, is read back.

    Raises ValueError for a value that is not of its field's type.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = ""  # what must stand in its brackets, such as the name of a file
    opens: ClassVar[bool] = False  # a file may stand there

    def __post_init__(self) -> None:
        check(self)

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: _text(values[f.name]) for f in fields(self) if _changed(self, f)}
        if not changed:
            return self.name
        first = list(changed) == [fields(self)[0].name]
        words = changed.values() if first else (f"{name}={x}" for name, x in changed.items())
        return f"{self.name}({','.join(words)})"


def _changed(named: Named, field: Any) -> bool:
    return getattr(named, field.name) != field.default


def _text(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read(part: str, text: str, what: str, kinds: Mapping[str, Callable[[], type[T]]]) -> T:
    """The object of one part of a text. what: "selector"; kinds: name → what gives its class.

    ValueError for an unknown name, with the known ones, and for values that it does not take.
    """
    match = re.fullmatch(r"\s*([a-z]+(?:-[a-z]+)*)\s*(?:\(([^()]*)\))?\s*", part)
    name = match[1] if match else part
    if match is None or name not in kinds:
        known, example = ", ".join(kinds), _EXAMPLES[what]
        raise ValueError(f"unknown {what} {text!r}: choose one of {known}, such as {example}")
    given = [x.strip() for x in (match[2] or "").split(",") if x.strip()]
    named = dict(x.split("=", 1) for x in given if "=" in x)
    bare = [_value(x) for x in given if "=" not in x]
    kind = kinds[name]()
    if kind.needs and not given:
        raise ValueError(f"{what} {name} needs {kind.needs}: {name}({kind.needs})")
    try:
        return kind(*bare, **{key.strip(): _value(x) for key, x in named.items()})
    except TypeError:
        raise ValueError(f"{what} {name} does not take {', '.join(given) or 'nothing'}") from None


_EXAMPLES = {"selector": "sub or sub(8)", "branch": "decay or conv(3x5x5)"}


def _value(text: str) -> object:
    """ "8" as 8, "0.5" as 0.5, "1x2x2" as (1, 2, 2); any other text as it is."""
    text = text.strip()
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(map(int, text.split("x")))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def kind_in(room: str, place: str) -> type:
    """The class of a place such as "window:Nearest" in a room of dit_accel.methods."""
    module, _, kind = place.partition(":")
    return getattr(import_module(f"dit_accel.methods.{room}.{module}"), kind)
