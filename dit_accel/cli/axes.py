"""The options of `dit-accel bench` that say at which tables, lengths and shares it times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from dit_accel.cli.options import option, words

if TYPE_CHECKING:
    from dit_accel.bench.axes import Axes

_AXES = "Operators by the shape of the table"
Names = list[str] | None


@dataclass(frozen=True)
class AxisOptions:
    """At which tables, lengths and shares operators are timed."""

    pattern: Annotated[
        Names, option("topk, random, window, stripe, per-head, top-p. \\[all]", _AXES)
    ] = None
    length: Annotated[
        Names, option("Tokens, such as 8k (8192) or 75600. \\[some that suit the device]", _AXES)
    ] = None
    ranks: Annotated[
        Names, option("Processes, of which the share of one is timed: 1,2,4. \\[1]", _AXES)
    ] = None

    def axes(
        self,
        device: str,
        shapes: Names,
        keeps: list[float] | None,
        ops: Names,
        dtype: str | None,
        **fixed: Any,
    ) -> Axes:
        """What is timed, with what suits the device where nothing is asked for; ValueError for a
        value that is none."""
        import torch

        from dit_accel.bench.axes import LENGTHS, SHAPE, Axes
        from dit_accel.bench.operators import OPS
        from dit_accel.bench.patterns import PATTERNS

        return Axes(
            shapes=shapes or (SHAPE[device],),
            patterns=_several(self.pattern) or tuple(PATTERNS),
            lengths=[_length(text) for text in _several(self.length)] or LENGTHS[device],
            ranks=[_number("ranks", text) for text in _several(self.ranks)] or (1,),
            keeps=keeps or (0.1,),
            ops=ops or OPS[:1],
            dtype=getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16")),
            **fixed,
        )


def _several(given: Names) -> list[str]:
    """The values of an option, each word of which may be several with commas between."""
    return [value for word in given or () for value in words(word)]


def _length(text: str) -> int:
    """Tokens: "8k" is 8192."""
    thousands = text.lower().endswith("k")
    return _number("length", text[:-1] if thousands else text) * (1024 if thousands else 1)


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name} is a list of whole numbers with commas between, not {text!r}")
    return int(text)
