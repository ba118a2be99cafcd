"""Files that appear whole or not at all, and whether they can be written before work begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VIDEO = (".mp4", ".gif", ".webp")


IMAGE = (".png", ".jpg", ".webp")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well.

    On any error, Ctrl-C included, it is removed and whatever stood at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_target(path: str | Path, moving: bool = True) -> Path:
    """`path` if a clip (or a picture) can be written there; ValueError says why not."""
    path = Path(path)
    known = VIDEO if moving else IMAGE
    if path.suffix.lower() not in known:
        what = "a clip" if moving else "a picture"
        raise ValueError(f"the name of {what} ends in {', '.join(known)}: not {path.name!r}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    check_folder(path.parent)
    return path


def check_folder(folder: str | Path) -> Path:
    """`folder` if files can be written in it (it may not exist yet); ValueError says why not."""
    folder = Path(folder)
    standing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not standing.is_dir():
        raise ValueError(f"{standing} is a file: a folder was expected")
    if not os.access(standing, os.W_OK):
        raise ValueError(f"{standing} cannot be written to: choose another folder")
    return folder
