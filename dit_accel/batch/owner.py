"""Who works on a job, written so that anyone can tell whether that process is still alive."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def me() -> str:
    """This process: "host/boot/pid-namespace:pid:start"."""
    pid = os.getpid()
    return f"{_here()}:{pid}:{_start(pid)}"


def pid_of(owner: str) -> int:
    """The process id in an owner's name."""
    return int(owner.rsplit(":", 2)[1])


def is_here(owner: str) -> bool:
    """Whether the owner's process id means something to this process."""
    return owner.rsplit(":", 2)[0] == _here()


def is_alive(owner: str) -> bool:
    """Whether an owner for which `is_here` holds still runs; a reused process id does not count."""
    _, pid, start = owner.rsplit(":", 2)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start(int(pid)) == start


def _here() -> str:
    """Names the set of processes that can see one another: a reboot or a container starts anew."""
    return f"{platform.node()}/{_text('/proc/sys/kernel/random/boot_id')}/{_namespace()}"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start(pid: int) -> str:
    """When the process started, in clock ticks since boot; "" without /proc and for the dead.

    A zombie counts as dead: its parent has not collected it, but it will do no work.
    """
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if len(fields) < 20 or fields[0] in "ZX" else fields[19]


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
