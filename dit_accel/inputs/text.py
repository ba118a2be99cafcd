"""Text files as people write them: any line ending, with or without a byte order mark."""

from __future__ import annotations

import codecs
import re
import stat
from collections.abc import Iterator
from pathlib import Path

MOST_BYTES = 2**28
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MARK = "\ufeff"
# What str.splitlines() takes for the end of a line, and editors do not.
_SEPARATORS = str.maketrans(dict.fromkeys("\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))


def check_file(path: str | Path, what: str = "file") -> int:
    """The bytes of a file that can be read, counted; ValueError, with its name, for any other."""
    try:
        found = Path(path).stat()
        if stat.S_ISDIR(found.st_mode):
            raise ValueError(f"{path} is a folder: give the name of a {what}")
        if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
            raise ValueError(f"{path} is a device: give the name of a {what}")
    except FileNotFoundError:
        raise ValueError(f"there is no {what} {path}") from None
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror}") from None
    return found.st_size


def read_bytes(path: str | Path, what: str = "file") -> bytes:
    """The bytes of a file; ValueError, with its name, where there is none to be read."""
    size = check_file(path, what)
    if size > MOST_BYTES:
        most = f"at most {MOST_BYTES >> 20} are read"
        raise ValueError(f"{what} {path} has {size >> 20} MiB: {most}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror}") from None


def read(path: str | Path, what: str = "file") -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark; ValueError names the file."""
    data = read_bytes(path, what)
    try:
        return decode(data)
    except ValueError as error:
        raise ValueError(f"{what} {path}: {error}") from None


def decode(data: bytes) -> str:
    """The text of these bytes, without a byte order mark."""
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8")
    except UnicodeDecodeError:
        raise ValueError("this is not UTF-8 text: save it as UTF-8") from None
    return text.removeprefix(_MARK)


def lines(data: bytes) -> Iterator[tuple[int, str | ValueError]]:
    """(number from 1, line without white space around it); empty ones are left out.

    A line that is no text is an error in its place. Only \\n, \\r\\n and \\r end a line.
    """
    if data.startswith(_UTF16):
        try:
            data = decode(data).encode()
        except ValueError as error:
            yield 1, error
            return
    for number, raw in enumerate(re.split(rb"\r\n|\n|\r", data), 1):
        try:
            text = raw.decode().strip().lstrip(_MARK).strip()
        except UnicodeDecodeError:
            yield number, ValueError("this line is not UTF-8 text")
            continue
        if "\0" in text:
            yield number, ValueError("this line holds a NUL: save the file as UTF-8 text")
        elif text:
            yield number, text


def one_line(text: str) -> str:
    """The text with a blank for every character that some programs take for a line's end."""
    return text.translate(_SEPARATORS)
