"""Blocks by the product of their means: the first level of BiFormer's routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dit_accel.methods.selectors.base import Chosen, Selector, chosen

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Means(Selector):
    """score_nm = q̄_n·k̄_m."""

    name: ClassVar[str] = "means"
    description: ClassVar[str] = "key blocks whose mean has the largest product with the query's"
    paper: ClassVar[str] = "arXiv 2303.08810 (BiFormer), first level"

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: object
    ) -> Chosen:
        """See ops.block_table."""
        return chosen(q, k, call, sizes, **rules)
