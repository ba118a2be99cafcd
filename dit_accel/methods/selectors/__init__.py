"""The selectors, one file each: which key blocks a query block reads.

A text names one: "means", "sub", or "sub(8)" with its arguments. `dit_accel.selectors()` lists
them.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import NamedTuple

from dit_accel.methods.selectors.base import Scored, Selector

_HOME = {"means": "Means", "sub": "Sub"}

__all__ = ["Scored", "Selector", "SelectorInfo", "find", "infos"]


class SelectorInfo(NamedTuple):
    description: str
    paper: str


def find(text: str) -> Selector:
    """The selector of a text; ValueError for one that is none, with the known names."""
    match = re.fullmatch(r"\s*([a-z]+)\s*(?:\(([^()]*)\))?\s*", text)
    name = match[1] if match else text
    if name not in _HOME:
        known = ", ".join(_HOME)
        raise ValueError(f"unknown selector {text!r}: choose one of {known}, such as sub or sub(8)")
    given = match[2] if match and match[2] else ""
    arguments = [x.strip() for x in given.split(",") if x.strip()]
    kind = getattr(import_module(f"dit_accel.methods.selectors.{name}"), _HOME[name])
    try:
        return kind(*(int(x) if x.isdecimal() else x for x in arguments))
    except TypeError:
        raise ValueError(f"selector {name} does not take {', '.join(arguments)}") from None


def infos() -> dict[str, SelectorInfo]:
    """Name → what it does, and the paper."""
    kinds = {name: type(find(name)) for name in _HOME}
    return {name: SelectorInfo(kind.description, kind.paper) for name, kind in kinds.items()}
