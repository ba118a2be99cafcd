"""Pooled tail: a skipped block joins the softmax as one mean key and value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dit_accel import ops
from dit_accel.methods.base import Call, Method
from dit_accel.table import BlockTable

TAILS = ("mean", "line")


@dataclass(frozen=True)
class Pooled(Method):
    """Exact attention to the best key blocks, and to the mean of each of the others.

    A skipped block of c keys counts as c copies of its mean key and value in the same softmax, for
    each query token by itself: no weight is lost, and nothing has to be fine-tuned.

    Args:
        tail: what the values of a skipped block are taken for: their "mean", or a "line" of its
            keys, which adds the first-order term (local linear attention).

    Raises ValueError for another tail, and as Method.
    """

    tail: str = field(default="mean", kw_only=True)

    name: ClassVar[str] = "pooled"
    description: ClassVar[str] = "exact on the best key blocks, one pooled key and value for others"
    paper: ClassVar[str] = "arXiv 2107.05768 (Combiner)"
    by_rows: ClassVar[bool] = True
    later: ClassVar[tuple[str, ...]] = (*Method.later, "tail")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"keep": 0.6},
        "balanced": {"keep": 0.5},
        "fast": {"keep": 0.3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail not in TAILS:
            raise ValueError(f"tail is {' or '.join(map(repr, TAILS))}, not {self.tail!r}")

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        table, means = self.chosen(q, k, call, v, return_means=True)
        call.note(table)
        return ops.pooled_attention(
            q,
            k,
            v,
            table,
            scale=call.scale,
            kv_len=call.kv_len,
            means=means,
            line=self.tail == "line",
        )

    @property
    def by_parts(self) -> bool:
        return self.by_means and self.tail == "mean"

    def part(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: BlockTable, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.pooled_attention(q, k, v, table, call.scale, return_lse=True)
