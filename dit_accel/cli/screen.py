"""What is printed: text as it is, on a stream of any encoding."""

from __future__ import annotations

import io
import sys

from rich.console import Console


def screen(stderr: bool = False) -> Console:
    """A console that takes no letter of a prompt or a path for markup, emoji codes or a number."""
    return Console(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False)


def print_anything() -> None:
    """Letters that stdout and stderr cannot encode are written as escapes instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
