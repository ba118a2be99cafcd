"""Prompt files: one prompt a line, # starts a comment, a prompt that comes again counts once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dit_accel.inputs.text import lines, one_line, read_bytes

WHAT = "prompt file"


def prompt_lines(data: bytes) -> Iterator[tuple[int, str | ValueError]]:
    """(line number, prompt), or an error in the place of a line that is no text."""
    seen = set()
    for number, text in lines(data):
        if isinstance(text, str):
            text = one_line(text).strip()
            if text.startswith("#") or text in seen:
                continue
            seen.add(text)
        yield number, text


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file; ValueError names the file, and the line that is no text."""
    prompts = []
    for number, text in prompt_lines(read_bytes(path, WHAT)):
        if isinstance(text, ValueError):
            raise ValueError(f"{WHAT} {path}, line {number}: {text}")
        prompts.append(text)
    if not prompts:
        raise ValueError(f"{WHAT} {path} holds no prompt: write one on each line")
    return prompts
