"""What the span did to a token that did not run: R̂, from what it did to it and to others before.

Each way maps `Past` to [B, N, C] residuals; the rows of tokens that ran are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Memory:
    """One guidance pass between steps: R, its rate of change, and what the probe saw.

    residual: [B, N, C] R.
    seen: int64 [N], the step at which each token ran last.
    reference: [B, N, C], the probe's residual at that step.
    full: the step at which all tokens ran last.
    rate: [B, N, C] change of R per step, or None.
    text: [B, T, C], what the span did to the text, or None.
    """

    residual: Tensor
    seen: Tensor
    reference: Tensor
    full: int
    rate: Tensor | None = None
    text: Tensor | None = None

    @classmethod
    def of_all(cls, step: int, residual: Tensor, probe: Tensor, text: Tensor | None) -> Memory:
        """All tokens ran at `step`."""
        seen = torch.full((residual.shape[1],), step, device=residual.device)
        return cls(residual, seen, probe, step, text=text)

    def update(
        self,
        step: int,
        index: Tensor | None,
        fresh: Tensor,
        probe: Tensor,
        text: Tensor | None,
        rated: bool,
    ) -> None:
        """The tokens `index` (int64 [K], None for all) ran at `step`, with R = fresh [B, K, C].

        probe: [B, N, C] of this step. rated: keep the rate of change, too.
        """
        if index is None:
            self.full = step
            index = torch.arange(fresh.shape[1], device=fresh.device)
        if rated:
            age = (step - self.seen[index]).clamp(min=1).to(fresh.dtype)
            if self.rate is None:
                self.rate = torch.zeros_like(self.residual)
            self.rate[:, index] = (fresh - self.residual[:, index]) / age[:, None]
        self.residual[:, index] = fresh
        self.reference[:, index] = probe[:, index]
        self.seen[index] = step
        self.text = text

    def fits(self, residual: Tensor, probe: Tensor) -> bool:
        """Is what is kept of tokens like these? A batch may grow: of text, or after a step."""
        return self.residual.shape == residual.shape and self.reference.shape == probe.shape

    def tensors(self) -> list[Tensor]:
        """Those that are kept."""
        found = (self.residual, self.seen, self.reference, self.rate, self.text)
        return [x for x in found if x is not None]


@dataclass
class Past:
    """What is known when tokens must be restored.

    memory: as it was before this step.
    step: this one.
    index: int64 [K], tokens that ran.
    fresh: [B, K, C], R of those now.
    entered: [B, N, C], tokens where they entered the span.
    grid: (T, H, W) of the N tokens.
    order: int64 [N], their cells in that grid, or None for 0 … N.
    """

    memory: Memory
    step: int
    index: Tensor
    fresh: Tensor
    entered: Tensor
    grid: tuple[int, int, int]
    order: Tensor | None = None

    def age(self) -> Tensor:
        """[N, 1] steps since each token ran."""
        return (self.step - self.memory.seen).to(self.entered.dtype)[:, None]


def reuse(past: Past) -> Tensor:
    """R as it was."""
    return past.memory.residual


def taylor(past: Past) -> Tensor:
    """R extrapolated by its own last change, as TaylorSeer (arXiv 2503.06923) at order one."""
    memory = past.memory
    return memory.residual if memory.rate is None else memory.residual + past.age() * memory.rate


def blend(past: Past) -> Tensor:
    """R moved by the mean rate at which R changed in the neighbouring cells that ran.

    A cell's neighbours are the 3 × 3 × 3 around it; where none of them ran, R stays as it was.
    """
    memory, index = past.memory, past.index
    if not index.numel():
        return memory.residual
    rate = torch.zeros_like(memory.residual)
    rate[:, index] = (past.fresh - memory.residual[:, index]) / past.age()[index].clamp(min=1)
    ran = rate.new_zeros(1, rate.shape[1], 1)
    ran[:, index] = 1
    cells = torch.arange(rate.shape[1], device=rate.device) if past.order is None else past.order

    def around(x: Tensor) -> Tensor:
        """[b, N, c] → the mean over each token's neighbouring cells."""
        spread = torch.empty_like(x)
        spread[:, cells] = x
        grid = spread.transpose(1, 2).unflatten(2, past.grid)
        grid = F.pad(grid, (1,) * 6)  # a grid may be thinner than the window
        return F.avg_pool3d(grid, 3, 1).flatten(2).transpose(1, 2)[:, cells]

    return memory.residual + past.age() * around(rate) / around(ran).clamp(min=1 / 27)


def copy(past: Past) -> Tensor:
    """R of the token that ran and entered the span most alike (cosine), as token merging does
    (arXiv 2303.17604)."""
    if not past.index.numel():
        return past.memory.residual
    unit = F.normalize(past.entered, dim=-1)
    ran = unit[:, past.index].transpose(1, 2)
    nearest = [(rows @ ran).argmax(-1) for rows in unit.split(1024, dim=1)]
    rows = torch.cat(nearest, dim=1)[..., None].expand_as(past.entered)
    return past.fresh.gather(1, rows)


RESTORES: dict[str, Callable[[Past], Tensor]] = {
    "reuse": reuse,
    "taylor": taylor,
    "blend": blend,
    "copy": copy,
}
