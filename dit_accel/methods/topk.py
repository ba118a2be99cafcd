"""Top-k block-sparse attention: the base of the other methods (r = 1, C = 0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dit_accel import ops
from dit_accel.methods.base import Call, Method, check_rounding
from dit_accel.ops.checks import check_precision
from dit_accel.table import BlockTable


@dataclass(frozen=True)
class TopK(Method):
    """Each query block attends exactly to the key blocks whose means score highest.

    Args:
        rounding: of the number of blocks kept, "up" or "down".
        precision: None, or attention in eight bits: "int8", or "int8-hadamard", which turns q and k
            first (ops.block_sparse_attention).
    """

    name: ClassVar[str] = "topk"
    description: ClassVar[str] = "exact attention to the key blocks with the highest mean score"
    by_rows: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"keep": 0.7},
        "balanced": {"keep": 0.6},
        "fast": {"keep": 0.3},
    }

    precision: str | None = None
    rounding: str = "up"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounding(self.rounding)
        check_precision(self.precision)

    @property
    def rounds_down(self) -> bool:
        return self.rounding == "down"

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        table = self.table(q, k, call, v)
        return ops.block_sparse_attention(
            q, k, v, table, scale=call.scale, kv_len=call.kv_len, precision=self.precision
        )

    @property
    def by_parts(self) -> bool:
        return self.by_means and self.precision is None

    def part(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: BlockTable, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.block_sparse_attention(q, k, v, table, call.scale, return_lse=True)
