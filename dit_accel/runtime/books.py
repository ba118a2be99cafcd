"""What an accelerated pipeline did: by layer, by step, by reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from dit_accel.machine import Stopwatch
from dit_accel.table import BlockTable


@dataclass
class LayerBook:
    """What one layer did: number `number` in the pipeline's transformer `part`.

    kept: sums over its sparse calls.
    """

    name: str
    number: int
    part: int = 0
    sparse: int = 0
    dense: int = 0
    kept: float | torch.Tensor = 0.0


@dataclass
class StepBook:
    """One transformer forward: where it stood, what its layers did, how long it took. skipped: by a
    step cache, but for the first block."""

    step: int
    passname: str
    watch: Stopwatch
    sparse: int = 0
    dense: int = 0
    kept: float | torch.Tensor = 0.0
    tokens: float = 1.0
    skipped: bool = False


@dataclass
class Books:
    """All that is counted between `accelerate` and the report.

    strict: a dense call that no schedule asked for is an error.
    layers: of all transformers, one after another.
    forwards: of the last generation.
    reasons: why calls ran dense → how many.
    unplanned: those of the reasons that no schedule asked for.
    implementations: operator and implementation that served → calls.
    watcher: hears of each table that is read, with the number of its layer.
    """

    strict: bool = False
    layers: list[LayerBook] = field(default_factory=list)
    forwards: list[StepBook] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    unplanned: set[str] = field(default_factory=set)
    implementations: dict[str, int] = field(default_factory=dict)
    watcher: Callable[[int, BlockTable], None] | None = None

    def blank(self) -> Books:
        """Books of the same layers in which nothing is written yet."""
        layers = [LayerBook(book.name, book.number, book.part) for book in self.layers]
        return Books(self.strict, layers)

    def clear(self) -> None:
        """Count anew."""
        new = self.blank()
        self.layers, self.forwards, self.reasons = new.layers, new.forwards, new.reasons
        self.unplanned, self.implementations = new.unplanned, new.implementations

    def add(self, other: Books) -> None:
        """Count what other books of the same layers have, those of one forward."""
        here: tuple[LayerBook | StepBook, ...] = (*self.layers, self.forwards[-1])
        there: tuple[LayerBook | StepBook, ...] = (*other.layers, other.forwards[-1])
        for book, more in zip(here, there, strict=True):
            book.sparse += more.sparse
            book.dense += more.dense
            if more.sparse:
                book.kept = book.kept + more.kept
        self.forwards[-1].skipped |= other.forwards[-1].skipped
        self.unplanned |= other.unplanned
        for mine, its in (
            (self.reasons, other.reasons),
            (self.implementations, other.implementations),
        ):
            for name, count in its.items():
                mine[name] = mine.get(name, 0) + count

    def _open(self, layer: int) -> list[LayerBook | StepBook]:
        """Where a call of `layer` is written: its own book, and that of the forward."""
        return [self.layers[layer], *self.forwards[-1:]]

    def dense(self, layer: int, reason: str, planned: bool) -> None:
        """A call of `layer` ran dense. RuntimeError where it should not have."""
        if not planned and self.strict:
            raise RuntimeError(
                f"layer {self.layers[layer].name} cannot run sparse: {reason}; "
                "call accelerate with strict=False to let it run dense"
            )
        if not planned:
            self.unplanned.add(reason)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        for book in self._open(layer):
            book.dense += 1

    def sparse(self, layer: int, table: BlockTable | None) -> None:
        """A call of `layer` read the blocks of `table`, or all."""
        kept = 1.0 if table is None else table.density()
        if self.watcher is not None and table is not None:
            self.watcher(layer, table)
        for book in self._open(layer):
            book.sparse += 1
            book.kept = book.kept + kept

    def skip(self) -> None:
        """A step cache skips the forward at hand."""
        for book in self.forwards[-1:]:
            book.skipped = True

    def served(self, by: Iterable[str]) -> None:
        """Names of the implementations that ran in a call."""
        for name in by:
            self.implementations[name] = self.implementations.get(name, 0) + 1
