"""Which emoji and colours the model learns, and the caption of each pair: one explicit rule."""

from __future__ import annotations

import re
import zlib

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (229, 57, 53),
    "yellow": (253, 216, 53),
    "green": (67, 160, 71),
    "blue": (30, 136, 229),
    "purple": (142, 36, 170),
    "pink": (244, 143, 177),
    "brown": (121, 85, 72),
    "gray": (144, 144, 144),
    "white": (250, 250, 250),
    "black": (24, 24, 24),
}
MIN_FRAMES = 48
_NEAR_DUPLICATES = re.compile(r"o’clock|-thirty|^person |^people |holding hands|^(men|women) ")
_WORD = re.compile(r"[\w’'-]+")
_ZWJ = 0x200D
_SKIN_TONES = range(0x1F3FB, 0x1F400)


def code_points(stem: str) -> tuple[int, ...] | None:
    """Code points of a file name such as `2764-fe0f`, without variation selectors; None if odd."""
    if not re.fullmatch(r"[0-9a-f]{2,6}(-[0-9a-f]{2,6})*", stem):
        return None
    return tuple(p for p in (int(c, 16) for c in stem.split("-")) if p != 0xFE0F)


def is_chosen(points: tuple[int, ...], name: str, frames: int) -> bool:
    """True for an animation of at least two seconds that is nobody's variant.

    Left out: skin tones, joined sequences (gender and family variants), clock faces, and the
    generic persons, who differ from one another in little but the pose.
    """
    variant = _ZWJ in points or any(p in _SKIN_TONES for p in points)
    return frames >= MIN_FRAMES and not variant and not _NEAR_DUPLICATES.search(name)


def words(text: str) -> list[str]:
    """The words of a prompt as the tokenizer splits them, lower case."""
    return _WORD.findall(text.lower())


def caption(name: str, colour: str) -> str:
    """The prompt of one (emoji, colour) pair."""
    return f"{name} on a {colour} background"


def held_out(name: str) -> str:
    """The one colour that this emoji is never trained on: a hash of its name, so it never moves."""
    return list(COLOURS)[zlib.crc32(name.encode()) % len(COLOURS)]
