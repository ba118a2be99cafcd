"""Progress on stderr: bars on a terminal, one plain line per phase elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from dit_accel.cli.screen import screen


class Progress:
    """Call it with (phase, done, total); total None is a phase of unknown length.

    A new phase name closes the one before. `prefix` is put before the names. Use it in a with
    block: bars are stopped however the block ends.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or screen(stderr=True)
        self.prefix = ""
        self._phase, self._began = "", 0.0
        self._task = TaskID(0)
        self._bars: Bars | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<24}", markup=False),
                BarColumn(32),
                MofNCompleteColumn(),
            )
            self._bars = Bars(*columns, TimeElapsedColumn(), console=self.console)
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._close()
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int | None = None) -> None:
        phase = f"{self.prefix}{phase}"
        if phase != self._phase:
            self._close()
            self._open(phase, total)
        if self._bars is not None:
            self._bars.update(self._task, completed=done, total=total)

    def _open(self, phase: str, total: int | None) -> None:
        self._phase, self._began = phase, time.perf_counter()
        if self._bars is not None:
            self._task = self._bars.add_task(phase, total=total)

    def _close(self) -> None:
        """The running phase is over: fill its bar, or print its line."""
        if not self._phase:
            return
        if self._bars is None:
            seconds = time.perf_counter() - self._began
            self.console.print(f"{self._phase}: {seconds:.1f} s")
        else:
            task = next(t for t in self._bars.tasks if t.id == self._task)
            total = task.total or max(task.completed, 1)
            self._bars.update(self._task, completed=total, total=total)
            self._bars.stop_task(self._task)
        self._phase = ""
