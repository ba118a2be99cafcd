"""Blocks by the attention that the means of their parts tell: BiFormer's second level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dit_accel.methods.selectors.base import Chosen, Selector, chosen

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Sub(Selector):
    """score_nm = mean over the parts a of n of softmax_m(ln Σ_{b in m} |b| e^{scale · q̄_a·k̄_b}).

    Args:
        parts: of a block: 2, 4 … 64. One part more or less is `Means`; as many as tokens give the
            blocks' exact shares of the attention, at the cost of dense scores.

    Raises ValueError for another number.
    """

    parts: int = 4

    name: ClassVar[str] = "sub"
    description: ClassVar[str] = "key blocks by the attention of the means of their parts"
    paper: ClassVar[str] = "arXiv 2303.08810 (BiFormer), second level"

    def __post_init__(self) -> None:
        if self.parts not in (2, 4, 8, 16, 32, 64):
            raise ValueError(f"a block has 2, 4, 8, 16, 32 or 64 parts, not {self.parts}")

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: object
    ) -> Chosen:
        """See `parts` of ops.block_table."""
        return chosen(q, k, call, sizes, parts=self.parts, **rules)
