"""Recorded forwards, by what came before them, each with how it left its engine."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from dit_accel.ops.backends import Choice
from dit_accel.runtime.books import Books
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.first_block import FirstBlockCache, Known
from dit_accel.runtime.kinds import Given
from dit_accel.runtime.recorder import Recording

MOST = 8  # ways to begin, or to go on, that are kept: shapes, numbers of steps


@dataclass(eq=False)
class Recorded:
    """A forward that can be replayed. inputs: where it reads its arguments; made: its pieces; held:
    tensors that it reads, too, and that nobody else may hold; answer: what its step cache decided,
    None without one."""

    inputs: list[Any]
    made: Recording
    held: list[object]
    after: After | None
    answer: bool | None

    def begin(self, given: Given, cache: FirstBlockCache | None) -> bool | None:
        """Up to where the step cache decides, for other arguments of the same kind; what it
        decides."""
        for own, x, read in zip(self.inputs, given.leaves, given.read, strict=True):
            if read:
                own.copy_(x)
        if cache is None or not self.made.asked:
            return self.answer
        self.made.pieces[0]()
        return cache.decision.decide(self.made.asked[0].item())

    def finish(self, engine: Engine | None, cache: FirstBlockCache | None) -> Any:
        """What the forward returns, in memory of its own."""
        self.made.pieces[-1]()
        if self.after is not None and engine is not None:
            self.after.restore(engine, cache)
        leaves, spec = tree_flatten(self.made.out)
        return tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in leaves], spec)


@dataclass(eq=False)
class State:
    """What methods and a step cache keep from forward to forward."""

    state: dict[Any, Any]
    together: dict[Any, Any]
    stateless_from: int | None
    cached: dict[str, Known]
    computes: bool | None

    @classmethod
    def of(cls, engine: Engine, cache: FirstBlockCache | None) -> State:
        """Now."""
        known, computes = ({}, None) if cache is None else (dict(cache.memory), cache.computes)
        own = _copied(engine.state), _copied(engine.together), engine.stateless_from
        return cls(*own, known, computes)

    def restore(self, engine: Engine, cache: FirstBlockCache | None) -> None:
        """As it was."""
        for own, left in ((engine.state, self.state), (engine.together, self.together)):
            own.clear()
            own.update(_copied(left))
        engine.stateless_from = self.stateless_from
        if cache is not None:
            cache.restore(self.cached, self.computes)


@dataclass(eq=False)
class After:
    """How a forward left its engine, and what was booked in it; dense: calls of each kind that a
    dense backend served."""

    state: State
    books: Books
    dense: dict[Any, int]

    def restore(self, engine: Engine, cache: FirstBlockCache | None) -> None:
        """As if the forward had run."""
        self.state.restore(engine, cache)
        engine.books.add(self.books)
        for key, calls in self.dense.items():
            _choices(engine)[key].calls += calls


@dataclass(eq=False)
class Node:
    """A forward that was seen, and what came next. ran: what a step cache decided where it ran as
    ever; recorded: by what it decided; last: the last time."""

    next: dict[Hashable, Node] = field(default_factory=dict)
    ran: set[bool | None] = field(default_factory=set)
    recorded: dict[bool | None, Recorded] = field(default_factory=dict)
    last: bool | None = None


@dataclass(eq=False)
class Tree:
    """The forwards of one engine. at: where its generation stands; answer: what a step cache
    decided there; replayed: all of it so far; mark: an object of this generation, None where that
    is not known."""

    root: Node = field(default_factory=Node)
    at: Node = field(default_factory=Node)
    mark: object = None
    generation: int | None = None
    replayed: bool = True
    answer: bool | None = None

    def begin(self, generation: int) -> None:
        """Back to the root where a new generation starts."""
        if generation != self.generation:
            self.at, self.generation, self.replayed = self.root, generation, True
            self.mark, self.answer = object(), None

    def go(self, key: Hashable) -> tuple[Node, bool]:
        """On to what comes next, and whether it was seen before."""
        ways, key = self.at.next, (self.answer, key)
        known = key in ways
        node = ways.setdefault(key, Node())
        while len(ways) > MOST:
            del ways[next(iter(ways))]
        self.at = node
        return node, known

    def went(self, node: Node, answer: bool | None) -> None:
        """What a step cache decided in the forward at hand."""
        self.answer = node.last = answer


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
