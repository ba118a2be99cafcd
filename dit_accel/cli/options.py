"""What the command line adds to generation.options. Imports nothing heavy.

A command takes an option by its name there (`steps: Steps = None`), or several as a group (`where:
Where`, see command.py); what only it has it describes itself, with `option`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from dit_accel.generation.options import WHAT


class BadInput(Exception):
    """What the user gave cannot be used; the message is one sentence."""

    exit_code = 2


@contextmanager
def checked() -> Iterator[None]:
    """Errors about arguments inside this block are the user's to mend: no traceback."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from error


def option(text: str, panel: str, *names: str) -> object:
    """A typer option under the heading `panel` of the help; its default is told in `text`."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


PROMPTS, SEEDS = "Text file, a prompt a line.", "Comma-separated. \\[0]"
Metadata = Annotated[
    bool,
    option(
        "Write into the file what it was made from; see `show`.", WHAT, "--metadata/--no-metadata"
    ),
]


def words(text: str) -> list[str]:
    """The parts of "steps, pooled/window(t=3,h=8)": commas in brackets part nothing."""
    parts = re.split(r",(?![^(]*\))", text)
    return [part.strip() for part in parts if part.strip()]


def seeds(text: str) -> list[int]:
    """ "0,1" as seeds; ValueError for what is none."""
    from dit_accel.generation.limits import check_limits

    found = numbers(text, int, "seeds")
    for seed in found:
        check_limits({"seed": seed})
    return found


def numbers(text: str, kind: Callable[[str], Any], name: str) -> list[Any]:
    """ "0.1,0.2" as numbers; ValueError names the option."""
    try:
        found = [kind(part) for part in words(text)]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"{name} is a comma-separated list of numbers, not {text!r}")
    return found
