"""Worker processes: started, watched, and replaced when they die with work left to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dit_accel.batch.folder import LOGS
from dit_accel.batch.manifest import DiskFull, Manifest
from dit_accel.batch.worker import DEVICE_LOST, DISK_FULL, NO_MODEL
from dit_accel.batch.writer import FULL
from dit_accel.media import owner as owners

FALSE_STARTS = 3


@dataclass
class _Slot:
    """One place in the fleet: its device, its process, and how often it died without a job."""

    number: int
    device: str
    threads: int
    process: subprocess.Popen | None = None
    false_starts: int = 0


class Fleet:
    """`devices` names one worker each. Workers end with this object, whatever happens.

    threads: CPU threads of each worker; 0 leaves PyTorch's choice.
    """

    def __init__(self, manifest: Manifest, devices: Sequence[str], threads: int = 0) -> None:
        self.manifest = manifest
        self.slots = [_Slot(n, device, threads) for n, device in enumerate(devices)]
        self.stopped = ""
        self._done_before = manifest.counts()["done"]

    def __enter__(self) -> Fleet:
        (self.manifest.folder / LOGS).mkdir(exist_ok=True)
        for slot in self.slots:
            self._start(slot)
        return self

    def __exit__(self, *error: object) -> None:
        living = [slot.process for slot in self.slots if slot.process is not None]
        for process in living:
            process.terminate()
        for process in living:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with suppress(DiskFull):  # the next run sees that they are gone
                for owner in self._owners(process.pid):
                    self.manifest.release(owner, "the run was stopped")
                    self.manifest.leave(owner)

    def _start(self, slot: _Slot) -> None:
        with self._log(slot).open("ab") as log:
            slot.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "dit_accel.batch.child"),
                    *(str(self.manifest.folder.absolute()), slot.device, str(slot.threads)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to deal with
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            )

    def _log(self, slot: _Slot) -> Path:
        return self.manifest.folder / LOGS / f"worker-{slot.number}.log"

    def _owners(self, pid: int) -> list[str]:
        """The names under which a process of ours has worked: one, or none before it was ready."""
        rows = self.manifest.ask("SELECT DISTINCT owner FROM events WHERE kind = 'ready'")
        names = [row["owner"] for row in rows]
        return [n for n in names if owners.is_here(n) and owners.pid_of(n) == pid]

    def tend(self) -> bool:
        """Bury the dead and replace them; False once no worker is left."""
        for slot in self.slots:
            process = slot.process
            code = process.poll() if process is not None else None
            if process is not None and code is not None:
                slot.process = None
                self._ended(slot, process.pid, code)
        return any(slot.process is not None for slot in self.slots)

    def _ended(self, slot: _Slot, pid: int, code: int) -> None:
        reason = self._why(slot, code)
        known = self._owners(pid)
        for owner in known:
            self.manifest.bury(owner, reason)
        if code == DISK_FULL:
            self.stopped = FULL
        if code in (0, DISK_FULL, NO_MODEL):
            return
        self.manifest.note("worker", f"worker {slot.number}: {reason}")
        slot.false_starts = 0 if known else slot.false_starts + 1
        counts = self.manifest.counts()
        if slot.false_starts >= FALSE_STARTS:
            self._no_start(f"worker {slot.number} does not start: {reason}, see {self._log(slot)}")
        elif counts["waiting"] + counts["running"] and self.manifest.get("stop") is None:
            self._start(slot)

    def _no_start(self, reason: str) -> None:
        """Stop; ValueError where nothing has been made, so that going on is in vain."""
        if self.manifest.counts()["done"] == self._done_before:
            raise ValueError(reason)
        self.stopped = reason

    def _why(self, slot: _Slot, code: int) -> str:
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", perhaps by the system for want of memory" if name == "SIGKILL" else ""
            return f"its worker was killed by {name}{hint}"
        if code == DEVICE_LOST:
            return "its worker lost the device or hung"
        lines = self._log(slot).read_text("utf-8", "replace").strip().splitlines()
        return f"its worker ended with code {code}: {lines[-1] if lines else 'no message'}"
