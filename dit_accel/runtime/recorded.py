"""Recorded forwards, by what came before them, each with how it left its engine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from dit_accel.ops.backends import Choice
from dit_accel.runtime.books import Books
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.kinds import Given

MOST = 8  # ways to begin, or to go on, that are kept: shapes, numbers of steps


@dataclass(eq=False)
class Recorded:
    """A forward that can be replayed. inputs: where it reads its arguments; held: tensors that it
    reads, too, and that nobody else may hold."""

    inputs: list[Any]
    output: list[Any]
    spec: TreeSpec
    replay: Callable[[], None]
    held: list[object]
    after: After | None

    def again(self, given: Given, engine: Engine | None) -> Any:
        """What the forward returns, in memory of its own, for other arguments of the same kind."""
        for own, x, read in zip(self.inputs, given.leaves, given.read, strict=True):
            if read:
                own.copy_(x)
        self.replay()
        if self.after is not None and engine is not None:
            self.after.restore(engine)
        out = [x.clone() if isinstance(x, Tensor) else x for x in self.output]
        return tree_unflatten(out, self.spec)


@dataclass(eq=False)
class After:
    """How a forward left its engine, and what was booked in it; dense: calls of each kind that a
    dense backend served."""

    state: dict[Any, Any]
    together: dict[Any, Any]
    stateless_from: int | None
    books: Books
    dense: dict[Any, int]

    @classmethod
    def of(cls, engine: Engine, books: Books, dense: dict[Any, int]) -> After:
        """Of a forward that has just been recorded with these books."""
        state, together = _copied(engine.state), _copied(engine.together)
        return cls(state, together, engine.stateless_from, books, dense)

    def restore(self, engine: Engine) -> None:
        """As if the forward had run."""
        for own, left in ((engine.state, self.state), (engine.together, self.together)):
            own.clear()
            own.update(_copied(left))
        engine.stateless_from = self.stateless_from
        engine.books.add(self.books)
        for key, calls in self.dense.items():
            _choices(engine)[key].calls += calls


@dataclass(eq=False)
class Node:
    """A forward that was seen, and what came next."""

    next: dict[Hashable, Node] = field(default_factory=dict)
    recorded: Recorded | None = None


@dataclass(eq=False)
class Tree:
    """The forwards of one engine. at: where its generation stands; replayed: all of it so far;
    mark: an object of this generation, None where that is not known."""

    root: Node = field(default_factory=Node)
    at: Node = field(default_factory=Node)
    mark: object = None
    generation: int | None = None
    replayed: bool = True

    def begin(self, generation: int) -> None:
        """Back to the root where a new generation starts."""
        if generation != self.generation:
            self.at, self.generation, self.replayed = self.root, generation, True
            self.mark = object()

    def go(self, key: Hashable) -> tuple[Node, bool]:
        """On to what comes next, and whether it was seen before."""
        ways, known = self.at.next, key in self.at.next
        node = ways.setdefault(key, Node())
        while len(ways) > MOST:
            del ways[next(iter(ways))]
        self.at = node
        return node, known


@contextmanager
def apart(engine: Engine | None) -> Iterator[tuple[Books, dict[Any, int]]]:
    """What is counted in a block, in books of its own; the calls of dense backends once it ends."""
    dense: dict[Any, int] = {}
    if engine is None:
        yield Books(), dense
        return
    real, choices = engine.books, _choices(engine)
    before = {key: choice.calls for key, choice in choices.items()}
    engine.books = books = real.blank()
    books.forwards = [replace(real.forwards[-1], sparse=0, dense=0, kept=0.0)]
    try:
        yield books, dense
    finally:
        engine.books = real
        for key, choice in choices.items():
            dense[key] = choice.calls - before.get(key, 0)
            choice.calls -= dense[key]


def _choices(engine: Engine) -> dict[Any, Choice]:
    return {} if engine.backends is None else engine.backends.choices


def _copied(x: Any) -> Any:
    """Dictionaries and lists anew, what they hold as it is."""
    if isinstance(x, dict):
        return {key: _copied(value) for key, value in x.items()}
    return [_copied(value) for value in x] if isinstance(x, list) else x
