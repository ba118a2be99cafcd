"""Re-ttention (arXiv 2505.22918): a static window, rescaled and completed by an earlier full step.

With rescale=False it is DiTFastAttn (arXiv 2406.08552).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.kernels.block_table.torch import block_means
from dit_accel.memory import free_bytes
from dit_accel.methods.base import Call, Method
from dit_accel.selectors.window import WINDOWS, window_rows, window_table
from dit_accel.table import BlockTable, block_count

_RESIDUALS = ("full", "fp8", "pooled", "none")
_FP8 = torch.float8_e4m3fn
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rettention(Method):
    """Attention to the nearest blocks in every frame; the rest is remembered from a full step.

    A full step runs dense and keeps ρ = e^(L_window − L) and R = O − ρ·O_window; the steps after it
    give ρ·O_window + R, and ρ ← min(1, ρ + growth).

    Args:
        period: a full step comes at the latest this many steps after the last one; a schedule's
            `refresh` can ask for more.
        growth: λ, added to ρ after each sparse step.
        residual: how R is kept: "full" (the model's dtype), "fp8" (a scale per row), "pooled" (one
            mean per query block) or "none" (not at all).
        rescale: False takes ρ ≡ 1.
        window: "tile" (nearest in rows and columns) or "raster" (nearest in raster order).

    Raises ValueError for a value outside its range; RuntimeError, before it allocates, when the
    state of a guidance pass does not fit in the memory that is free.
    """

    keep: float = 0.1
    period: int = 5
    growth: float = 0.04
    residual: str = "full"
    rescale: bool = True
    window: str = "tile"

    name: ClassVar[str] = "rettention"
    description: ClassVar[str] = "a spatial window, rescaled and completed by an earlier full step"
    paper: ClassVar[str] = "arXiv 2505.22918"
    stateful: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"keep": 0.25, "period": 3},
        "balanced": {"keep": 0.1, "period": 5},
        "fast": {"keep": 0.05, "period": 8},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period < 1 or not 0 <= self.growth <= 1:
            raise ValueError(
                "period is a number of steps ≥ 1 and growth lies in [0, 1], "
                f"not {self.period} and {self.growth}"
            )
        if self.residual not in _RESIDUALS or self.window not in WINDOWS:
            raise ValueError(
                f"residual is one of {', '.join(_RESIDUALS)} and window one of "
                f"{', '.join(WINDOWS)}, not {self.residual!r} and {self.window!r}"
            )

    def state_bytes(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
        """Bytes kept for one layer in one guidance pass.

        shape: of q, (B, H, N, D), without text tokens. dtype: of the attention's tensors.
        """
        batch, heads, n, d = shape
        rows, item = batch * heads * n, torch.finfo(dtype).bits // 8
        kept = {
            "full": rows * d * item,
            "fp8": rows * (d + 4),
            "pooled": batch * heads * block_count(n, self.block_q) * d * item,
            "none": 0,
        }
        return kept[self.residual] + (rows * 4 if self.rescale else 0)

    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockTable:
        """The static window; ValueError when the tokens form no grid."""
        grid = call.grid
        if grid is None or grid[0] * grid[1] * grid[2] != q.shape[2]:
            raise ValueError(
                f"Re-ttention's window needs the grid of its {q.shape[2]} visual tokens, not {grid}"
            )
        wanted = (self.window, grid, k.shape[2], call.keep, self.block_q, self.block_k)
        window = call.state.get("window")
        if window is None or window[0] != wanted:
            rows = window_rows(*wanted, call.index, call.text_first, q.device)
            window = call.state["window"] = wanted, rows
        return window_table(window[1], *q.shape[:2])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        table, state = self.select(q, k, call), call.state
        known = state.get("shape") == (q.shape, q.dtype)
        if not known:
            self._announce(q, call)
        if not known or call.refresh or call.step - state["step"] >= self.period:
            call.note(None)
            return self._full(q, k, v, table, call)
        call.note(table)
        out = ops.block_sparse_attention(q, k, v, table, scale=call.scale, kv_len=call.kv_len)
        return self._complete(out, state)

    def _full(self, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call) -> Tensor:
        """A dense step, and what the sparse ones after it need."""
        full, window, lse, window_lse = ops.window_attention(
            q, k, v, table, scale=call.scale, kv_len=call.kv_len
        )
        state, place = call.state, call.state["window"]
        state.clear()  # the old tensors go before the new ones come
        state.update(step=call.step, shape=(q.shape, q.dtype), window=place)
        missing = full.float() - window
        if self.rescale:
            state["ratio"] = (window_lse - lse).exp().clamp(max=1)
            missing = torch.addcmul(full.float(), window, state["ratio"][..., None], value=-1)
        if self.residual == "full":
            state["residual"] = missing.to(q.dtype)
        if self.residual == "pooled":
            state["residual"] = block_means(missing, self.block_q).to(q.dtype)
        if self.residual == "fp8":
            top = missing.abs().amax(-1, keepdim=True).clamp(min=1e-12)
            state["scale"] = top / torch.finfo(_FP8).max
            state["residual"] = (missing / state["scale"]).to(_FP8)
        return full

    def _complete(self, out: Tensor, state: dict[str, Any]) -> Tensor:
        """ρ · O_window + R, and ρ grows."""
        missing = state.get("residual")
        if self.residual == "fp8":
            missing = missing.float() * state["scale"]
        if self.residual == "pooled":
            missing = missing.repeat_interleave(self.block_q, 2)[:, :, : out.shape[2]]
        result = out.float()
        if self.rescale:
            result = result * state["ratio"][..., None]
            state["ratio"].add_(self.growth).clamp_(max=1)
        if missing is not None:
            result = result + missing
        return result.to(out.dtype)

    def _announce(self, q: Tensor, call: Call) -> None:
        """Say the bytes of a pass once, and refuse before allocating when they do not fit."""
        each = self.state_bytes(q.shape, q.dtype)
        if call.layer == call.layers[0]:
            total = each * len(call.layers) / 2**20
            _LOG.info("Re-ttention keeps %.1f MiB for pass %r", total, call.passname)
        left = each * sum(layer >= call.layer for layer in call.layers)
        free = free_bytes(q.device)
        if free is not None and left > free:
            raise RuntimeError(
                f"Re-ttention's state needs {left / 2**20:.0f} MiB for the layers from "
                f"{call.layer} on in pass {call.passname!r}, but {q.device} has "
                f"{free / 2**20:.0f} MiB free; take residual='fp8' or 'pooled', or more "
                "dense_layers"
            )
