"""Files that appear whole or not at all, and whether they can be written before work begins."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VIDEO = (".mp4", ".gif", ".webp")
IMAGE = (".png", ".jpg", ".jpeg", ".webp")
ROOM = 2**20  # bytes free, at least, where a file is to be written


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well.

    On any error, Ctrl-C included, it is removed and whatever stood at `path` stays. A link stays a
    link: the file that it names is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = zlib.crc32(os.fsencode(path.name))  # the name itself may be as long as a name can be
    temporary = path.with_name(f".{mark:08x}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> Path:
    """A text file in UTF-8, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def check_target(path: str | Path, moving: bool | None = True, room: int = ROOM) -> Path:
    """`path` if a clip can be written there; ValueError says why not, before the work is done.

    moving: whether it is a clip or a picture; None, either. room: bytes it will take.
    """
    path = Path(path)
    known = {True: VIDEO, False: IMAGE, None: tuple(dict.fromkeys(VIDEO + IMAGE))}[moving]
    if path.suffix.lower() not in known:
        what = {True: "a clip", False: "a picture", None: "a clip or a picture"}[moving]
        raise ValueError(f"the name of {what} ends in {', '.join(known)}: not {path.name!r}")
    return check_place(path, room)


def check_place(path: str | Path, room: int = ROOM) -> Path:
    """`path` if a file, whatever its kind, can be written there; ValueError says why not."""
    path = Path(path)
    _check_names(path)
    path_is = Path(os.path.realpath(path))
    if path_is.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if path_is.exists() and not path_is.is_file():
        raise ValueError(f"{path} is no regular file: give another name")
    if path_is.exists() and not os.access(path_is, os.W_OK):
        raise ValueError(f"{path} is write-protected: give another name")
    check_folder(path_is.parent, room)
    return path


def check_folder(folder: str | Path, room: int = ROOM) -> Path:
    """`folder` if files can be written in it (it may not exist yet); ValueError says why not.

    Tried, not guessed: a nameless file is made where the folder is, or will be.
    """
    folder = Path(folder)
    _check_names(folder)
    standing = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not os.path.isdir(standing):
        raise ValueError(f"{standing} is a file: a folder was expected")
    try:
        with tempfile.TemporaryFile(dir=standing):
            pass
    except OSError as error:
        why = error.strerror or "it takes no files"
        raise ValueError(
            f"{standing} cannot be written to ({why}): choose another folder"
        ) from None
    free = shutil.disk_usage(standing).free
    if free < room:
        raise ValueError(
            f"{standing} has {free / 2**20:.1f} MiB free, {room / 2**20:.1f} are needed: make room"
        )
    return folder


def make_folder(folder: str | Path) -> Path:
    """`folder`, made where it was not; ValueError when files cannot be written in it."""
    folder = check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made: {error.strerror}") from None
    return folder


def check_own(
    folder: Path, record: str, names: Iterable[str], mark: bytes = b'"dit_accel"'
) -> None:
    """ValueError where one of `names` stands in a folder in which no run of ours has written.

    A folder is ours when the file `record` in it holds `mark`.
    """
    with suppress(OSError), (folder / record).open("rb") as file:
        if mark in file.read(2**20):
            return
    for name in (record, *names):
        if os.path.lexists(folder / name):
            raise ValueError(
                f"{folder / name} was not written by this command: choose another folder, or move "
                "it away"
            )


def elsewhere(room: int = ROOM) -> Path | None:
    """A new folder with room for what could not be written where it should be; None: nowhere."""
    for parent in (tempfile.gettempdir(), Path.home(), Path.cwd()):
        with suppress(OSError, ValueError):
            check_folder(parent, room)
            return Path(tempfile.mkdtemp(prefix="dit-accel-", dir=parent))
    return None


def _check_names(path: Path) -> None:
    """Each part of a path, and the whole, as long as this system takes, in bytes."""
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} is no name of a file: it holds a NUL")
    most, longest = 255, 4095
    for part in path.parts:
        if len(os.fsencode(part)) > most:
            length = len(os.fsencode(part))
            raise ValueError(f"the name {part[:40]}… has {length} bytes, at most {most} are taken")
    if len(os.fsencode(path.absolute())) > longest:
        raise ValueError(f"the path {str(path)[:40]}… is longer than {longest} bytes")
