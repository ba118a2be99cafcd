"""One process at a time writes to a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dit_accel.media import owner as owners
from dit_accel.media.files import make_folder

LOCK = ".dit-accel.lock"


@contextmanager
def held(folder: str | Path) -> Iterator[Path]:
    """The folder is this process's for the length of the block; it is made where it was not.

    The lock of a process that has ended does not count. Raises ValueError while another one has
    the folder.
    """
    fresh = not os.path.lexists(folder)
    path = make_folder(folder) / LOCK
    _take(path)
    try:
        yield path.parent
    finally:
        with suppress(OSError):
            path.unlink()
        if fresh:
            with suppress(OSError):  # something has been written
                path.parent.rmdir()


def _take(path: Path) -> None:
    """Make the lock, which names this process; a dead one's is removed first."""
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(owners.me())
            return
        except FileExistsError:
            holder = path.read_text("utf-8", errors="replace")
        if not _ended(holder):
            break
        with suppress(FileNotFoundError):
            path.unlink()
    raise ValueError(
        f"{path.parent} is in use by process {_named(holder)}: wait until it has ended (if it has, "
        f"remove {path}), or choose another folder"
    )


def _ended(holder: str) -> bool:
    try:
        return owners.is_here(holder) and not owners.is_alive(holder)
    except ValueError:  # it names no process
        return False


def _named(holder: str) -> str:
    try:
        return f"{owners.pid_of(holder)} on {owners.host_of(holder)}"
    except (ValueError, IndexError):
        return "of which nothing is known"
