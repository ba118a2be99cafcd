"""Roles, barriers and pending copies of an emulated program, in an order drawn at random."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

_RUNNING: list[Machine] = []


def machine() -> Machine:
    """The program that runs now."""
    return _RUNNING[0]


def start(program: Machine) -> None:
    """Make a program the one that runs now."""
    _RUNNING[:] = [program]


class Deadlock(RuntimeError):
    """Every role waits."""


class Killed(SystemExit):
    """Ends the thread of a role after an error elsewhere."""


class Barrier:
    """An mbarrier: a phase completes when all have arrived and all bytes have landed."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phases = 0

    def index(self, _: int) -> Barrier:
        return self

    def change(self, arrivals: int, transferred: int) -> None:
        self.pending -= arrivals
        self.bytes += transferred
        assert self.pending >= 0, "one arrival too many"
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phases = self.count, self.phases + 1


class Machine:
    """The scheduler of one program."""

    def __init__(self, seed: int, program: int, programs: int) -> None:
        self.random, self.program, self.programs = random.Random(seed), program, programs
        self.events: list[Callable[[], None]] = []
        self.main, self.role = threading.Semaphore(0), None
        self.barriers: list[Barrier] = []
        self.hastes: dict[Any, float] = {}

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let others run, and go on some time after `until` holds."""
        role = self.role
        if role is None:
            return
        role.until = until
        self.main.release()
        role.turn.acquire()
        if role.killed:
            raise Killed

    def haste(self, one: Any) -> float:
        """Some copies and roles are slower than others by orders of magnitude."""
        return self.hastes.setdefault(one, 10 ** self.random.uniform(-4, 0))

    def run(self, roles: list[Role]) -> None:
        try:
            while True:
                ready: list[Any] = [r for r in roles if not r.done and r.until()]
                ready += self.events
                if not ready:
                    break
                chosen = self.random.choices(ready, [self.haste(x) for x in ready])[0]
                if isinstance(chosen, Role):
                    self.role = chosen
                    chosen.turn.release()
                    self.main.acquire()
                    self.role = None
                    if chosen.error is not None:
                        raise chosen.error
                else:
                    self.events.remove(chosen)
                    chosen()
            if not all(r.done for r in roles):
                raise Deadlock([r.name for r in roles if not r.done])
            assert not any(b.bytes for b in self.barriers), "a copy was never waited for"
        finally:
            for role in roles:
                if not role.done:
                    role.killed = True
                    role.turn.release()


class Role(threading.Thread):
    """Warps that run one function."""

    def __init__(self, fn: Callable[..., None], args: tuple) -> None:
        super().__init__(daemon=True, name=fn.__name__)
        self.fn, self.args = fn, args
        self.turn, self.until = threading.Semaphore(0), lambda: True
        self.done = self.killed = False
        self.error: BaseException | None = None
        self.products: list[Any] = []
        self.stores: list[Callable[[], None]] = []

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.killed:
                self.fn(*self.args)
        except Killed:
            return
        except BaseException as error:
            self.error = error
        self.done = True
        machine().main.release()
