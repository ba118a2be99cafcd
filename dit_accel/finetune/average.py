"""The moving average of what is trained, and putting it in the model's place for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """Exponential moving average, fp32; with decay 0 there is none: `values` is empty."""

    def __init__(self, live: dict[str, Tensor], decay: float) -> None:
        self.live, self.decay = live, decay
        self.values = {n: p.detach().float().clone() for n, p in live.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` ≥ 1: the decay grows from 0.2 to its value."""
        if not self.values:
            return
        decay = min(self.decay, (1 + step) / (9 + step))
        torch._foreach_lerp_(
            list(self.values.values()), [p.float() for p in self.live.values()], 1 - decay
        )

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average, if there is one, inside this block."""
        kept = {name: self.live[name].detach().clone() for name in self.values}
        try:
            for name, x in self.values.items():
                self.live[name].copy_(x)
            yield
        finally:
            for name, x in kept.items():
                self.live[name].copy_(x)
