"""Names of files that any file system takes, on any system, counted in bytes."""

from __future__ import annotations

import re
import unicodedata

MOST_BYTES = 240  # of a name without suffix: 255 less ".dense.mp4" and some
SUFFIXES = (".mp4", ".png")  # of what a batch writes
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows
_NAME = re.compile(r"\w[\w .,=+-]*")


def from_text(text: str, most: int = 60) -> str:
    """A name made of a text's letters and digits, at most `most` bytes long: "a-red-cat".

    Letters of any script count; "" where the text has none.
    """
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())
    name = cut("-".join(words), most).strip("-")
    return f"{name}-clip" if _RESERVED.fullmatch(name) else name


def cut(name: str, most: int) -> str:
    """The start of a name, at most `most` bytes of UTF-8; no letter is halved."""
    return name.encode()[:most].decode(errors="ignore")


def check_name(name: str) -> str:
    """A user's own name for a clip, without the suffix if it has one of ours.

    Raises ValueError for a name with a folder or signs that some file system refuses, one that is
    too long in bytes, reserved, or the name of a dense clip beside a checked one.
    """
    for suffix in SUFFIXES:
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    name = unicodedata.normalize("NFC", name)
    if not _NAME.fullmatch(name) or name[-1] in ". ":
        raise ValueError(f"name is a file's, without folder and suffix: not {name[:60]!r}")
    if len(name.encode()) > MOST_BYTES:
        raise ValueError(f"name has {len(name.encode())} bytes: a file's has at most {MOST_BYTES}")
    if _RESERVED.fullmatch(name):
        raise ValueError(f"the name {name!r} is reserved on some systems: choose another")
    if name.lower().endswith(".dense"):
        raise ValueError(f"the name {name!r} is a checked job's dense clip: choose another")
    return name


def same(name: str) -> str:
    """What two names have in common that are one file on some system."""
    return unicodedata.normalize("NFC", name).casefold()
