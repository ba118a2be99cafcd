"""What a method will keep from step to step, said and checked before the first step is made."""

from __future__ import annotations

import logging

import torch

from dit_accel.forward.clock import Clock
from dit_accel.machine import free_bytes
from dit_accel.methods import Method
from dit_accel.runtime.books import Books
from dit_accel.schedule import Plan

_LOG = logging.getLogger(__name__)
_SHARE = 0.75  # of the free memory, which a state may take where layers can run without theirs


class StateTooLarge(RuntimeError):
    """What a method would keep does not fit in the memory that is free."""

    exit_code = 2


class Announcer:
    """At the first attention call of a generation, dense or not, the shape of every state is known.

    Passes that are not foreseen (a pipeline that names none) are announced when they first come.
    """

    def __init__(self, method: Method, clock: Clock, books: Books, plans: list[Plan]) -> None:
        self._method, self._clock = method, clock
        self._books, self._plans = books, plans
        self._generation, self._covered = -1, 0
        self._seen: set[str] = set()
        self._stateless_from: int | None = None

    def __call__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> int | None:
        """The first layer that must do without a state, or None. Logs the bytes.

        shape: of q (B, H, N, D), without text. StateTooLarge where the state does not fit in free
        memory, unless layers of the method can run without theirs.
        """
        clock, method = self._clock, self._method
        if clock.generation != self._generation:
            self._generation, self._covered, self._stateless_from = clock.generation, 0, None
            self._seen = set()
        seen = clock.passname in self._seen
        self._seen.add(clock.passname)
        if seen or len(self._seen) <= self._covered:
            return self._stateless_from
        sparse = [set(plan.sparse_layers()) for plan in self._plans]
        layers = sorted(b.number for b in self._books.layers if b.number in sparse[b.part])
        passes = max(1, clock.passes - self._covered)
        self._covered += passes
        each = method.state_bytes(shape, dtype) * passes
        total, free = each * len(layers), free_bytes(device)
        what = f"the state of {method.name} takes {total / 2**20:.1f} MiB: "
        what += f"{len(layers)} layers in {passes} guidance pass{'es' * (passes > 1)}"
        if method.divisible and free is not None and total > _SHARE * free:
            first, before = layers[int(_SHARE * free) // each], self._stateless_from
            self._stateless_from = first if before is None else min(first, before)
            what += f", but {device} has {free / 2**20:.1f} MiB free: layers from "
            _LOG.info(f"{what}{self._stateless_from} on run without one")
            return self._stateless_from
        _LOG.info(what)
        if free is not None and total > free:
            raise StateTooLarge(
                f"{what}, but {device} has {free / 2**20:.1f} MiB free; take residual='fp8', "
                "more dense_layers, or method='pooled', which keeps nothing"
            )
        return self._stateless_from
