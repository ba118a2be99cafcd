"""The selectors, one file each: which key blocks a query block reads.

A text names one, with what it is told in brackets: "sub", "sub(8)", "window(t=3,h=8,w=8)"; "sub &
window(t=1)" reads what either of the two chooses. `dit_accel.selectors()` lists them.
"""

from __future__ import annotations

import re
from functools import reduce
from importlib import import_module
from typing import NamedTuple

from dit_accel.methods.selectors.base import Scored, Selector

_HOME = {
    "means": "means:Means",
    "sub": "sub:Sub",
    "window": "window:Window",
    "nearest": "window:Nearest",
    "power": "static:Power",
    "shards": "static:Shards",
    "axes": "static:Axes",
    "relative": "relative:Relative",
    "valued": "valued:Valued",
    "regions": "regions:Regions",
    "tree": "regions:Tree",
    "slash": "slash:Slash",
    "chunks": "chunks:Chunks",
    "per-head": "per_head:PerHead",
}

__all__ = ["Scored", "Selector", "SelectorInfo", "find", "infos", "opens_a_file"]


class SelectorInfo(NamedTuple):
    """needs: what must stand in its brackets, or ""."""

    description: str
    paper: str
    needs: str


def find(text: str) -> Selector:
    """The selector of a text; ValueError for one that is none, with the known names."""
    found = [_one(part, text) for part in text.split("&")]
    if len(found) == 1:
        return found[0]
    from dit_accel.methods.selectors.both import Both

    return reduce(Both, found)


def _one(part: str, text: str) -> Selector:
    match = re.fullmatch(r"\s*([a-z]+(?:-[a-z]+)*)\s*(?:\(([^()]*)\))?\s*", part)
    name = match[1] if match else part
    if match is None or name not in _HOME:
        known = ", ".join(_HOME)
        raise ValueError(f"unknown selector {text!r}: choose one of {known}, such as sub or sub(8)")
    given = [x.strip() for x in (match[2] or "").split(",") if x.strip()]
    named = dict(x.split("=", 1) for x in given if "=" in x)
    bare = [_value(x) for x in given if "=" not in x]
    kind = _kind(name)
    if kind.needs and not given:
        raise ValueError(f"selector {name} needs {kind.needs}: {name}({kind.needs})")
    try:
        return kind(*bare, **{key.strip(): _value(x) for key, x in named.items()})
    except TypeError:
        raise ValueError(f"selector {name} does not take {', '.join(given) or 'nothing'}") from None


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


def _kind(name: str) -> type[Selector]:
    module, _, kind = _HOME[name].partition(":")
    return getattr(import_module(f"dit_accel.methods.selectors.{module}"), kind)


def infos() -> dict[str, SelectorInfo]:
    """Name → what it does, and the paper."""
    kinds = {name: _kind(name) for name in _HOME}
    return {
        name: SelectorInfo(kind.description, kind.paper, kind.needs) for name, kind in kinds.items()
    }


def opens_a_file(text: str) -> bool:
    """Would `find` open a file that this text names?"""
    return any(info.needs and name in text for name, info in infos().items())
