"""Blocks by their keys and their values: Dynamic Mask Attention (arXiv 2508.02124) without
training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dit_accel import ops
from dit_accel.methods.selectors.base import Scored
from dit_accel.methods.selectors.estimates import mean_scores, whole

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Valued(Scored):
    """score_nm = scale · q̄_n·k̄_m + ln ‖v̄_m‖: a block counts by what it would add to the output."""

    name: ClassVar[str] = "valued"
    description: ClassVar[str] = "block means, and the size of the mean value"
    paper: ClassVar[str] = "arXiv 2508.02124 (Dynamic Mask Attention), training-free"

    @property
    def reads_values(self) -> bool:
        return True

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """[B, H, Mq, Mk]; ValueError where no values are at hand."""
        if call.values is None:
            raise ValueError("valued looks at v, which this call was not given: hand it over")
        size = ops.block_means(call.values.detach(), sizes[1], call.kv_len).norm(dim=-1)
        return (
            mean_scores(q, k, call, sizes)
            + whole(size.clamp(min=1e-30).log(), k, sizes)[:, :, None]
        )
