"""Rectified SpaAttn (arXiv 2511.19835): O = r · O_sparse + C from pooled attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dit_accel import ops
from dit_accel.methods.base import Call, Method
from dit_accel.methods.selectors.base import Chosen
from dit_accel.methods.selectors.near import around


@dataclass(frozen=True)
class Rectified(Method):
    """Exact attention to the critical blocks, scaled by the mass they hold, plus pooled values.

    Args:
        mass: p: critical are at least the blocks that hold this much pooled attention; 0 is off.
        neighbours: key blocks on either side of a query block's own that are always critical, or
            None to let its own and its neighbours compete like all others.
        gapr: compensate a skipped block only where its estimated gain exceeds its error.

    `keep`, mass and neighbours are a union, so that more than `keep` is read; the report has the
    share that was. Raises ValueError for a value outside its range.
    """

    mass: float = 0.3
    neighbours: int | None = 1
    gapr: bool = True

    name: ClassVar[str] = "rectified"
    description: ClassVar[str] = "sparse attention rescaled to its mass, plus pooled values"
    paper: ClassVar[str] = "arXiv 2511.19835"
    by_rows: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"keep": 0.7},
        "balanced": {"keep": 0.5},
        "fast": {"keep": 0.3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mass < 1:
            raise ValueError(f"mass is a share of the attention in [0, 1), not {self.mass}")
        if self.neighbours is not None and self.neighbours < 0:
            raise ValueError(f"neighbours is a number of blocks ≥ 0 or None, not {self.neighbours}")

    def choose(
        self, q: torch.Tensor, k: torch.Tensor, call: Call, v: torch.Tensor | None = None
    ) -> Chosen:
        """max(K, as many as hold `mass`) best blocks, the neighbours and the text; block means."""
        near: tuple[torch.Tensor | None, int] = (None, 0)
        if self.neighbours is not None:
            near = around(q, k, call, self.sizes(q, call), self.neighbours)
        critical = {"mass": self.mass, "near": near[0], "max_near": near[1]}
        return self.chosen(q, k, call, v, **critical, return_means=True, spreads=self.gapr)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        table, means = self.choose(q, k, call, v)
        call.note(table)
        return ops.rectified_attention(
            q, k, v, table, call.scale, self.gapr, kv_len=call.kv_len, means=means
        )
