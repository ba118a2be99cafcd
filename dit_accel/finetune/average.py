"""The moving average of what is trained, and putting it in the model's place for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """Exponential moving average, fp32; decay 0 follows the parameters themselves."""

    def __init__(self, live: dict[str, Tensor], decay: float) -> None:
        self.live, self.decay = live, decay
        self.values = {name: p.detach().float().clone() for name, p in live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` ≥ 1: the decay grows from 0.2 to its value."""
        decay = min(self.decay, (1 + step) / (9 + step))
        torch._foreach_lerp_(
            list(self.values.values()), [p.float() for p in self.live.values()], 1 - decay
        )

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average inside this block."""
        kept = {name: p.detach().clone() for name, p in self.live.items()}
        try:
            for name, p in self.live.items():
                p.copy_(self.values[name])
            yield
        finally:
            for name, p in self.live.items():
                p.copy_(kept[name])
