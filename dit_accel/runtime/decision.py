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
    def differs(self, now: Tensor, last: Tensor, group: dist.ProcessGroup | None) -> bool:
        """Of what is added [B, N, C] and what was; group: the processes that share the tokens,
        which decide alike."""
        moved, size = (now - last).abs(), last.abs()
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
