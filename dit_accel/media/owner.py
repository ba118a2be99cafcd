"""Who holds something, written so that anyone can tell whether that process is still the same."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

CLOSE = 2.0  # seconds by which the system's word on a process's start may differ


def me() -> str:
    """This process: "host/boot/pid-namespace:pid:start"."""
    process = psutil.Process()
    return f"{_here()}:{process.pid}:{process.create_time():.2f}"


def pid_of(owner: str) -> int:
    """The process id in an owner's name."""
    return int(owner.rsplit(":", 2)[1])


def host_of(owner: str) -> str:
    """The host in an owner's name."""
    return owner.partition("/")[0]


def is_here(owner: str) -> bool:
    """Whether the owner's process id means something to this process."""
    return owner.rsplit(":", 2)[0] == _here()


def is_alive(owner: str) -> bool:
    """Whether an owner for which `is_here` holds still runs; a reused process id does not count,
    nor does a process that has ended and is still listed."""
    _, pid, start = owner.rsplit(":", 2)
    try:
        process = psutil.Process(int(pid))
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        return abs(process.create_time() - float(start)) < CLOSE
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False


def _here() -> str:
    """Names the set of processes that can see one another: a reboot or a container starts anew.

    psutil knows neither boots nor containers; where the system does not tell, the host has to do.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{platform.node()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()}//"
