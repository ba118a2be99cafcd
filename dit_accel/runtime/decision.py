"""Whether a step changes what the first block adds to the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import torch.distributed as dist

    from dit_accel.runtime.recorder import Ask


_AT_ONCE = 2**26  # values in float32
_DOUBT = 0.2  # of a way that is expected: see first_block


class Unseen(Exception):
    """A forward that is being recorded goes a way that it never ran."""


class Decision:
    """threshold: relative change up to which it does not; may change between forwards."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._asks: tuple[Ask, Set[object]] | None = None

    def decide(self, change: float) -> bool:
        """Whether so much is a change."""
        return change > self.threshold

    @torch.compiler.disable
    def pace(
        self, now: Tensor, last: Tensor, before: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        """How many times the way from `before` to `last` [B, N, C] it is from there to `now`,
        along that way, for each sample [B], float32; of all the processes that share the tokens."""
        way = last - before
        both = torch.stack([_dots(now - last, way), _dots(way, way)])
        if group is not None:
            torch.distributed.all_reduce(both, group=group)
        along, square = both
        return torch.where(square > 0, along / square, 0.0)

    @torch.compiler.disable
    def differs(
        self, now: Tensor, last: Tensor, expected: Tensor, group: dist.ProcessGroup | None
    ) -> bool:
        """Of what is added [B, N, C], was added last and is expected; group: the processes that
        share the tokens, which decide alike."""
        moved = (now - expected).abs() + _DOUBT * (expected - last).abs()
        size = expected.abs()
        if group is None:
            change = moved.mean() / size.mean()
        else:
            both = torch.stack([moved.float().sum(), size.float().sum()])
            torch.distributed.all_reduce(both, group=group)
            change = both[0] / both[1]
        if self._asks is None:
            return self.decide(change.item())
        ask, seen = self._asks

        def decide(change: float) -> bool:
            if (differs := self.decide(change)) not in seen:
                raise Unseen
            return differs

        return ask(change, decide)

    @contextmanager
    def asking(self, ask: Ask, seen: Set[object]) -> Iterator[None]:
        """A block in which a forward is recorded: the change is asked of what records. Unseen where
        the answer is not among `seen`."""
        self._asks = ask, seen
        try:
            yield
        finally:
            self._asks = None


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """The product of each sample of x and y [B, N, …], in float32, some tokens at a time."""
    some = max(1, _AT_ONCE * x.shape[1] // max(1, x.numel()))
    parts = zip(x.split(some, 1), y.split(some, 1), strict=True)
    return torch.stack([(a.float() * b.float()).flatten(1).sum(1) for a, b in parts]).sum(0)
