"""`dit-accel show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.options import checked


def show(
    file: Annotated[Path, typer.Argument(help="Clip or picture that dit-accel made.")],
    as_json: Annotated[bool, typer.Option("--json", help="The facts as JSON.")] = False,
) -> None:
    """Say what a clip was made from, and print the lines that make it again.

    dit-accel show rocket-on-a-blue-background.mp4
    """
    from rich.text import Text

    from dit_accel.cli.screen import screen
    from dit_accel.generation import facts as about
    from dit_accel.media import metadata

    with checked():
        facts = metadata.read(file)
        if facts is None:
            raise ValueError(
                f"{file} says nothing of how it was made: it is another program's, or --no-metadata"
            )
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    out = screen()
    for name, value in about.lines(facts):
        out.print(Text.assemble((f"{name:<10}", "dim"), value))
    with checked():
        out.print(f"\n{about.python(facts)}")
