"""The selectors, one file each: which key blocks a query block reads.

A text names one, with what it is told in brackets: "sub", "sub(8)", "window(t=3,h=8,w=8)"; "sub &
window(t=1)" reads what either of the two chooses. `dit_accel.selectors()` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

from dit_accel.methods.selectors.base import Scored, Selector
from dit_accel.methods.texts import kind_in, read

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
    "learned": "learned:Router",
}

__all__ = ["Scored", "Selector", "SelectorInfo", "find", "infos", "opens_a_file"]


class SelectorInfo(NamedTuple):
    """needs: what must stand in its brackets, or ""."""

    description: str
    paper: str
    needs: str


def find(text: str) -> Selector:
    """The selector of a text; ValueError for one that is none, with the known names."""
    found = [read(part, text, "selector", _kinds()) for part in text.split("&")]
    if len(found) == 1:
        return found[0]
    from dit_accel.methods.selectors.both import Both

    return reduce(Both, found)


def _kinds() -> dict[str, Callable[[], type[Selector]]]:
    return {name: partial(kind_in, "selectors", place) for name, place in _HOME.items()}


def infos() -> dict[str, SelectorInfo]:
    """Name → what it does, and the paper."""
    kinds = {name: kind() for name, kind in _kinds().items()}
    return {
        name: SelectorInfo(kind.description, kind.paper, kind.needs) for name, kind in kinds.items()
    }


def opens_a_file(text: str) -> bool:
    """Would `find` open a file that this text names, whatever space is in it?"""
    kinds, text = ((name, kind()) for name, kind in _kinds().items()), "".join(text.split())
    return any(kind.opens and f"{name}(" in text for name, kind in kinds)
