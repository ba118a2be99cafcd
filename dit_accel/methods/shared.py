"""Shared residual: pooled attention, completed by what an earlier full step found it to miss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from dit_accel import ops
from dit_accel.methods.base import Call
from dit_accel.methods.dense import Dense
from dit_accel.methods.pooled import Pooled
from dit_accel.methods.selectors import Selector
from dit_accel.methods.selectors.sub import Sub
from dit_accel.methods.stateful import Remembering
from dit_accel.table import BlockTable

# Full steps early in the run, where R changes most; those of a quarter's period, measured by
# `dit-accel evaluate` with benchmarks/proof_rows.py, are 1.9 to 2.5 dB less close at as much work.
EARLY = (0.25, 0.4, 0.65)


@dataclass(frozen=True)
class SharedResidual(Remembering):
    """O = O_pooled + R with R = O_dense − O_pooled of the last full step.

    Residual sharing is DiTFastAttn's (arXiv 2406.08552), there over a fixed window; here over
    pooled attention, whose blocks are chosen anew at each full step and which drops nothing.
    `period`, `residual` and what is raised are Remembering's, but that layers whose state finds no
    room run pooled, at every step: the last ones, since the first ones err most without R.
    """

    keep: float = 0.2
    select: Selector | str = field(default=Sub(), kw_only=True)
    period: float | int | tuple[float | int, ...] = EARLY

    divisible: ClassVar[bool] = True
    name: ClassVar[str] = "shared"
    description: ClassVar[str] = "pooled attention, completed by an earlier full step's residual"
    paper: ClassVar[str] = "arXiv 2406.08552 (residual sharing)"
    by_rows: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"keep": 0.1, "period": 0.25},
        "balanced": {"keep": 0.05, "period": 0.25},
        "fast": {"keep": 0.05, "period": 0.4},
    }

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if call.stateless:
            sizes = (self.block_q, self.block_k)
            pooled = Pooled(self.keep, *sizes, select=self.select, reuse=self.reuse)
            return pooled(q, k, v, call)
        return super().attend(q, k, v, call)

    def full(
        self, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Dense attention, and pooled beside it."""
        return Dense()(q, k, v, call), self.partial(q, k, v, table, call)

    def partial(self, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call) -> Tensor:
        """O_pooled."""
        return ops.pooled_attention(q, k, v, table, scale=call.scale, kv_len=call.kv_len)

    def table(self, q: Tensor, k: Tensor, call: Call, v: Tensor | None = None) -> BlockTable:
        """The best blocks of the last full step: R is what these missed."""
        if "table" not in call.state:
            call.state["table"], _ = self.chosen(q, k, call, v)
        return call.state["table"]
