"""What tokens that run see of the tokens that do not: nothing, or their keys of an earlier step.

    drop     only tokens that run are keys
    stale    the others are keys too, as they were when they ran last
    pooled   the others stand as their block's mean key and value, each counted once per token:
             exp(q·k̄ + log m), the softmax of sparse attention's pooled compensation

The keys are handed to the attention as m equal rows, which is the same softmax: any method and any
backend serves them. What falls is the memory: "pooled" keeps 1/block of what "stale" keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONTEXTS = ("drop", "pooled", "stale")


@dataclass
class Context:
    """Keys and values of the visual tokens of each layer in the span, between steps.

    kind: "pooled" or "stale". block: tokens of a pooled block. memory: name of a call → its keys
    and values, [B, N, H, D] (stale) or [B, N / block, H, D] (pooled).
    """

    kind: str
    block: int
    memory: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self, fresh: bool) -> None:
        """A forward starts. fresh: of a new generation."""
        self._masks.clear()
        if fresh:
            self.memory.clear()

    def remember(self, name: object, k: Tensor, v: Tensor) -> None:
        """All tokens ran: k, v [B, N, H, D]."""
        self.memory[name] = (self._shrink(k), self._shrink(v))

    def complete(
        self, name: object, k: Tensor, v: Tensor, visual: slice, index: Tensor, n: int
    ) -> tuple[Tensor, Tensor]:
        """k, v [B, K + text, H, D], `visual` where the tokens `index` of n lie in them → the same
        with all n visual tokens, the others as they were."""

        def whole(x: Tensor, old: Tensor) -> Tensor:
            full = old.clone() if self.kind == "stale" else self._grow(old, n)
            full[:, index] = x[:, visual]
            return full

        def among(x: Tensor, full: Tensor) -> Tensor:
            return torch.cat([x[:, : visual.start], full, x[:, visual.stop :]], dim=1)

        old_k, old_v = self.memory[name]
        full_k, full_v = whole(k, old_k), whole(v, old_v)
        self.remember(name, full_k, full_v)
        return among(k, full_k), among(v, full_v)

    def mask(
        self, mask: Tensor | None, visual: slice, n: int, product: bool = False
    ) -> Tensor | None:
        """The key padding [B, 1, 1, K + text] of the completed keys, or the product [B, 1, queries,
        K + text] of valid queries and valid keys where `product` says that the mask is one.

        Raises RuntimeError for another mask that tells one query from another.
        """
        if mask is None:
            return None
        padding = mask.ndim in (2, 4) and (product or mask.shape[1:-1].numel() == 1)
        if mask.dtype != torch.bool or not padding:
            raise RuntimeError(
                f"pruning with context={self.kind!r} takes a mask of key padding, not one of shape "
                f"{tuple(mask.shape)} and {mask.dtype}; take context='drop'"
            )
        if id(mask) not in self._masks:
            seen = mask[..., visual].any(-1, keepdim=True).expand(*mask.shape[:-1], n)
            parts = [mask[..., : visual.start], seen, mask[..., visual.stop :]]
            self._masks[id(mask)] = (mask, torch.cat(parts, dim=-1))
        return self._masks[id(mask)][1]

    def nbytes(self) -> int:
        return sum(x.nbytes for pair in self.memory.values() for x in pair)

    def _shrink(self, x: Tensor) -> Tensor:
        """[B, N, H, D] → the means of its blocks, the last one short; stale: a copy."""
        if self.kind == "stale":
            return x.clone()
        n, blocks = x.shape[1], -(-x.shape[1] // self.block)
        padded = F.pad(x, (0, 0, 0, 0, 0, blocks * self.block - n))
        sizes = torch.full((blocks, 1, 1), self.block, device=x.device)
        sizes[-1] = n - (blocks - 1) * self.block
        sums = padded.unflatten(1, (blocks, self.block)).sum(2, dtype=torch.float32)
        return (sums / sizes).to(x.dtype)

    def _grow(self, means: Tensor, n: int) -> Tensor:
        return means.repeat_interleave(self.block, dim=1)[:, :n].contiguous()
