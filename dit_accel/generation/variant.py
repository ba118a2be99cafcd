"""What is run, in a word: "topk/sub@0.1+prune+cache@0.05". All tables of all tools name rows so.

    variant = base [ "/" selector ] [ "@" keep ] { "+" part [ "@" value ] }

`base` is a method, or another word that a tool knows ("stock", "dense"); the selector chooses its
blocks, `keep` is their share, and the parts run beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dit_accel.methods import Method


@dataclass(frozen=True)
class Variant:
    """A name, read.

    name: as it was written.
    base: the word before all others.
    select: text of a selector, or None for the method's own.
    keep: share of key blocks kept, or None for the method's or the tool's own.
    parts: what runs beside it → its value, or None; in the order written.
    """

    name: str
    base: str
    select: str | None
    keep: float | None
    parts: Mapping[str, float | None]

    @classmethod
    def parse(cls, name: str, known: Mapping[str, bool]) -> Variant:
        """Read a name; `known` says what can be added here and whether it takes a value.

        ValueError for another part, for a value that is no number or stands where none is taken.
        """
        head, *added = name.split("+")
        head, keep = _value(name, head)
        base, slash, select = head.partition("/")
        return cls(name, base, select if slash else None, keep, additions(name, added, known))

    @property
    def plain(self) -> bool:
        """Whether the base stands without selector and keep."""
        return self.select is None and self.keep is None

    def of(self, method: Method) -> Method:
        """The method with this selector and this keep."""
        if self.select is not None:
            method = replace(method, select=self.select)
        return method if self.keep is None else replace(method, keep=self.keep)


def additions(
    name: str, added: Sequence[str], known: Mapping[str, bool]
) -> dict[str, float | None]:
    """What the texts after each "+" of `name` add; ValueError as in Variant.parse."""
    found = {}
    for text in added:
        part, value = _value(name, text)
        if part not in known:
            can = ", ".join(f"{part}@0.1" if takes else part for part, takes in known.items())
            raise ValueError(f"row {name!r} adds {part!r}; what can be added is {can}")
        if value is not None and not known[part]:
            raise ValueError(f"row {name!r} gives {part} a value; here it takes none")
        found[part] = value
    return found


def _value(name: str, text: str) -> tuple[str, float | None]:
    """ "cache@0.1" as ("cache", 0.1)."""
    word, at, number = text.partition("@")
    try:
        return word, float(number) if at else None
    except ValueError:
        raise ValueError(
            f"row {name!r} has {number!r} behind an @; write a number, as in {word}@0.1"
        ) from None
