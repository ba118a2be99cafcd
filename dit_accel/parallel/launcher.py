"""One command as several processes that share a generation: started, watched and ended together.

The processes find each other as those of `torchrun` do, which may start them as well.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO

MOST = 64
KV = ("gather", "ring")  # how keys reach the queries of each process, if not by heads
AGAIN = 75  # exit code: the processes lost each other, start them anew
_GRACE, _PAUSE = 10.0, 2.0


class Wanted(Exception):
    """The command at hand is to run as so many processes."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


def check(count: int, kv: str | None = None) -> None:
    """Refuse (ValueError) an impossible number and a way of keys that is none; raise Wanted where
    the processes are still to be started, and do nothing in one of them."""
    check_kv(kv, count)
    if not 1 <= count <= MOST:
        raise ValueError(f"ulysses is a number of processes from 1 to {MOST}, not {count}")
    if count == 1:
        return
    if not started():
        raise Wanted(count)
    world = os.environ.get("WORLD_SIZE")
    if world != str(count):
        raise ValueError(f"ulysses is {count}, but the launcher started {world} processes")


def check_kv(kv: str | None, count: int | None = None) -> None:
    """ValueError for another way of keys, and for one among fewer than two processes."""
    if kv not in (None, *KV):
        raise ValueError(f"kv is {', '.join(map(repr, KV))} or None (Ulysses), not {kv!r}")
    if kv is not None and count == 1:
        raise ValueError(
            f"kv={kv!r} says how keys travel between processes: add how many with ulysses, or "
            "leave kv out"
        )


def started() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def first(count: int) -> bool:
    """Whether this process is the one of `count` that prints and writes."""
    return count == 1 or os.environ.get("RANK", "0") == "0"


def device(asked: str | None) -> str | None:
    """The device of this process: its own GPU where there are any and `asked` is none else."""
    import torch

    if asked not in (None, "cuda") or not torch.cuda.is_available():
        return asked
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `dit-accel` with these arguments as `count` processes; the exit code of the first that
    failed, or 0. Processes that are left over are ended."""
    port = _free_port()
    logs: list[IO[bytes]] = [TemporaryFile() for _ in range(count - 1)]  # noqa: SIM115
    processes = [
        _start(rank, count, port, arguments, log) for rank, log in enumerate([None, *logs])
    ]
    try:
        failed = _watch(processes)
    finally:
        _end(processes)
    if failed is None:
        return 0
    if failed > 0:
        logs[failed - 1].seek(0)
        said = logs[failed - 1].read().decode(errors="replace")
        print(f"process {failed} of {count} failed:\n{said}", file=sys.stderr, end="")
    code = processes[failed].returncode
    return code if code > 0 else 128 - code


def _start(
    rank: int, count: int, port: int, arguments: Sequence[str], log: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    """The first process speaks; what the others say is kept in case they fail."""
    cores = os.cpu_count() or 1
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    mine = {"RANK": rank, "LOCAL_RANK": rank}
    threads = {"OMP_NUM_THREADS": max(1, cores // count)}
    env = {**{k: str(v) for k, v in threads.items()}, **os.environ}
    env |= {k: str(v) for k, v in (where | mine).items()}
    command = [sys.executable, "-m", "dit_accel", *arguments]
    return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; the number of the first that fails, at once, or None."""
    while True:
        codes = [process.poll() for process in processes]
        wrong = [rank for rank, code in enumerate(codes) if code]
        if wrong and codes[0] is None:  # what all refuse, the first one says best
            with suppress(subprocess.TimeoutExpired):
                processes[0].wait(_PAUSE)
            return 0 if processes[0].returncode else wrong[0]
        if wrong:
            return wrong[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    living = [process for process in processes if process.poll() is None]
    for process in living:
        process.terminate()
    for process in living:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
