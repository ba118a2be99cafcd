"""The branches of SLA, one file each: what its linear branch weighs, and what stands beside.

A text names one, with what it is told in brackets: "decay", "conv(3x5x5)"; "decay & rms" is both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from dit_accel.methods.branches.base import Branch
from dit_accel.methods.sorts import Sort
from dit_accel.methods.texts import kind_in, read

_HOME = {
    "plain": "base:Branch",
    "decay": "decay:Decay",
    "gated": "gated:Gated",
    "rala": "rala:RALA",
    "rms": "rms:RMS",
    "conv": "conv:Conv",
    "memory": "memory:Memory",
    "latents": "latents:Latents",
}

__all__ = ["Branch", "BranchInfo", "check", "find", "infos"]


class BranchInfo(NamedTuple):
    description: str
    paper: str


def find(text: str) -> Branch:
    """The branch of a text; ValueError for one that is none, with the known names."""
    found = [read(part, text, "branch", _kinds()) for part in text.split("&")]
    if len(found) == 1:
        return found[0]
    from dit_accel.methods.branches.several import Several

    return Several(tuple(found))


def check(branch: Branch, linear: str | None, sort: Sort) -> None:
    """ValueError for a branch that has nothing to weigh, and for an order of each head's tokens,
    which it cannot follow."""
    if linear is None and branch.alters:
        raise ValueError(f"branch={branch} weighs the linear branch, and linear=None has none")
    if branch.has("all_keys") and linear != "all":
        raise ValueError(f"branch={branch} is one for all keys: take linear='all', not {linear!r}")
    if sort and (branch.has("placed") or branch.has("gated")):
        raise ValueError(
            f"branch={branch} looks where tokens lie or at what they were made of, and sort={sort} "
            "moves them: take another branch, or no sort"
        )


def _kinds() -> dict[str, Callable[[], type[Branch]]]:
    return {name: partial(kind_in, "branches", place) for name, place in _HOME.items()}


def infos() -> dict[str, BranchInfo]:
    """Name → what it does, and the paper."""
    kinds = {name: kind() for name, kind in _kinds().items()}
    return {name: BranchInfo(kind.description, kind.paper) for name, kind in kinds.items()}
