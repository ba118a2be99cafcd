"""Re-ttention (arXiv 2505.22918): a static window, rescaled and completed by an earlier full step.

With rescale=False it is DiTFastAttn (arXiv 2406.08552).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.base import Call
from dit_accel.methods.selectors.base import expanded
from dit_accel.methods.selectors.window import WINDOWS, window_rows
from dit_accel.methods.stateful import Remembering
from dit_accel.table import BlockTable


@dataclass(frozen=True)
class Rettention(Remembering):
    """Attention to the nearest blocks in every frame; the rest is remembered from a full step.

    A full step runs dense and keeps ρ = e^(L_window − L) and R = O − ρ·O_window; the steps after it
    give ρ·O_window + R, and ρ ← min(1, ρ + growth).

    Args:
        growth: λ, added to ρ after each sparse step.
        rescale: False takes ρ ≡ 1.
        window: "tile" (nearest in rows and columns) or "raster" (nearest in raster order).

    `period` and `residual`, and what is raised, are Remembering's.
    """

    keep: float = 0.1
    growth: float = 0.04
    rescale: bool = True
    window: str = "tile"

    chooses: ClassVar[bool] = False
    name: ClassVar[str] = "rettention"
    description: ClassVar[str] = "a spatial window, rescaled and completed by an earlier full step"
    paper: ClassVar[str] = "arXiv 2505.22918"
    by_rows: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"keep": 0.05, "period": 0.15},
        "balanced": {"keep": 0.05, "period": 0.25},
        "fast": {"keep": 0.05, "period": 0.4},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.growth <= 1:
            raise ValueError(f"growth lies in [0, 1], not {self.growth}")
        if self.window not in WINDOWS:
            raise ValueError(f"window is one of {', '.join(WINDOWS)}, not {self.window!r}")

    def state_bytes(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
        """Bytes kept for one layer in one guidance pass: R and ρ; see Remembering."""
        ratio = shape[0] * shape[1] * shape[2] * 4 if self.rescale else 0
        return super().state_bytes(shape, dtype) + ratio

    def table(self, q: Tensor, k: Tensor, call: Call, v: Tensor | None = None) -> BlockTable:
        """The static window; ValueError when the tokens form no grid."""
        grid = call.grid
        n = call.queries or q.shape[2]
        if grid is None or grid[0] * grid[1] * grid[2] != n:
            raise ValueError(
                f"Re-ttention's window needs the grid of its {n} visual tokens, not {grid}"
            )
        sizes = self.sizes(q, call)
        wanted = (self.window, grid, k.shape[2], call.keep, *sizes)
        window = call.state.get("window")
        if window is None or window[0] != wanted:
            rows = window_rows(*wanted, call.index, call.text_first, q.device)
            window = call.state["window"] = wanted, rows.rows(call.first, q.shape[2])
        return expanded(window[1], *q.shape[:2])

    def full(
        self, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Dense and window attention, and ρ."""
        call.state.pop("ratio", None)
        out, window, lse, window_lse = ops.window_attention(
            q, k, v, table, scale=call.scale, kv_len=call.kv_len
        )
        if not self.rescale:
            return out, window.float()
        ratio = (window_lse - lse).exp().clamp(max=1)
        call.state["ratio"] = ratio.detach()
        return out, window.float() * ratio[..., None]

    def partial(self, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call) -> Tensor:
        """ρ · O_window, and ρ grows."""
        out = ops.block_sparse_attention(q, k, v, table, scale=call.scale, kv_len=call.kv_len)
        if not self.rescale:
            return out
        ratio = call.state["ratio"]
        out = out * ratio[..., None]
        call.state["ratio"] = (ratio + self.growth).clamp(max=1)  # autograd may hold the old one
        return out
