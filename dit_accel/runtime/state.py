"""What a method will keep from step to step, said and checked before the first step is made."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from dit_accel.machine import free_bytes

if TYPE_CHECKING:
    from dit_accel.runtime.engine import Engine

_LOG = logging.getLogger(__name__)
_SHARE = 0.75  # of the free memory, which a state may take where layers can run without theirs


class StateTooLarge(RuntimeError):
    """What a method would keep does not fit in the memory that is free."""


class Announcer:
    """At the first attention call of a generation, dense or not, the shape of every state is known.

    Passes that are not foreseen (a pipeline that names none) are announced when they first come.
    """

    def __init__(self) -> None:
        self._generation, self._covered = -1, 0
        self._seen: set[str] = set()

    def __call__(self, engine: Engine, q: Tensor, v: Tensor) -> None:
        """q, v [B, N, H, D]. Logs the bytes. Where they do not fit in free memory, layers of a
        divisible method do without from `engine.stateless_from` on; else StateTooLarge."""
        clock, method = engine.clock, engine.config.method
        if clock.generation != self._generation:
            self._generation, self._covered, self._seen = clock.generation, 0, set()
        if clock.passname in self._seen:
            return
        self._seen.add(clock.passname)
        if len(self._seen) <= self._covered:
            return
        passes = max(1, clock.passes - self._covered)
        self._covered += passes
        sparse = set(engine.plan.sparse_layers())
        numbers = sorted(book.number for book in engine.layers if book.number in sparse)
        layers = len(numbers)
        shape = (q.shape[0], q.shape[2], engine.geometry.n_visual, q.shape[3])
        each = method.state_bytes(shape, v.dtype) * passes
        total = each * layers
        what = f"the state of {method.name} takes {total / 2**20:.1f} MiB: "
        what += f"{layers} layers in {passes} guidance pass{'es' * (passes > 1)}"
        free = free_bytes(q.device)
        if method.divisible and free is not None and total > _SHARE * free:
            first = numbers[int(_SHARE * free) // each]
            before = engine.stateless_from
            engine.stateless_from = first if before is None else min(first, before)
            what += f", but {q.device} has {free / 2**20:.1f} MiB free: layers from "
            _LOG.info(f"{what}{engine.stateless_from} on run without one")
            return
        _LOG.info(what)
        if free is not None and total > free:
            raise StateTooLarge(
                f"{what}, but {q.device} has {free / 2**20:.1f} MiB free; take residual='fp8', "
                "more dense_layers, or method='pooled', which keeps nothing"
            )
