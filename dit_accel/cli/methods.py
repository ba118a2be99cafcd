"""`dit-accel methods`, `dit-accel selectors` and `dit-accel branches`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def methods() -> None:
    """List the methods, their presets and papers."""
    from rich.table import Table
    from rich.text import Text

    from dit_accel.cli.screen import screen
    from dit_accel.methods import find, infos

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("method", "what it does", "presets", "paper", "fine-tuning"):
        table.add_column(column)
    for name, info in infos().items():
        presets = ", ".join(f"{name}:{p}" for p in find(name).presets)
        tuned = "needed" if info.finetuning else "no"
        table.add_row(Text(name, "bold"), info.description, presets, info.paper, tuned)
    screen().print(table, soft_wrap=False)


def selectors() -> None:
    """List the selectors: how a method may choose the blocks it reads."""
    from dit_accel.methods.selectors import infos

    _list("selector", "what it reads", infos())


def branches() -> None:
    """List the branches of sla: what its linear branch weighs, and what stands beside."""
    from dit_accel.methods.branches import infos

    _list("branch", "what it is", infos())


def _list(kind: str, does: str, infos: Mapping[str, Any]) -> None:
    """A table of names, what they do, and papers."""
    from rich.table import Table
    from rich.text import Text

    from dit_accel.cli.screen import screen

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in (kind, does, "paper"):
        table.add_column(column)
    for name, info in infos.items():
        table.add_row(Text(name, "bold"), info.description, info.paper)
    screen().print(table, soft_wrap=False)
