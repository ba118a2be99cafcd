"""Blocks by how much less they hold than what is read anyway (AnchorAttention, arXiv 2505.23520;
SALE, arXiv 2505.24179)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.selectors.base import Chosen, Selector, valid, with_mass
from dit_accel.methods.selectors.estimates import shares
from dit_accel.methods.selectors.near import around
from dit_accel.table import BlockTable

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Relative(Selector):
    """The blocks m with LSE_m ≥ LSE_near − θ, at most the `keep` best of them, and those near: the
    query's own, their neighbours, the text.

    Rows keep unequal numbers. Log-sum-exps are those that means of parts tell, see
    ops.block_table.

    Args:
        theta: 12 is AnchorAttention's; SALE's threshold τ is θ = −ln τ.
        parts: of a block: 1, 2, 4 … 64.
        bits: to which q and k are rounded, token by token, for the estimate (SALE: 4, with as many
            parts as tokens), or None. What it finds is shown; it is no faster.
        reach: key blocks on either side of the query's own that are near.

    Raises ValueError for a value outside its range.
    """

    theta: float = 12.0
    parts: int = 1
    bits: int | None = None
    reach: int = 1

    name: ClassVar[str] = "relative"
    description: ClassVar[str] = "blocks within e^−θ of what is read anyway; keep is a cap"
    paper: ClassVar[str] = "arXiv 2505.23520 (AnchorAttention), arXiv 2505.24179 (SALE)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"a block has 1, 2, 4, 8, 16, 32 or 64 parts, not {self.parts}")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ValueError(f"bits is 2 to 8 or None, not {self.bits}")
        if self.reach < 0:
            raise ValueError(f"reach is a number of blocks ≥ 0, not {self.reach}")

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any
    ) -> Chosen:
        """The best blocks above the threshold; block means are not made."""
        near, width = around(q, k, call, sizes, self.reach)
        if rules.get("near") is not None:
            near, width = near | rules["near"], width + rules.get("max_near", 0)
        seen = [q, k] if self.bits is None else [_rounded(x, self.bits) for x in (q, k)]
        share = shares(seen[0], seen[1], call, sizes, self.parts)
        anyway = near if call.forced is None else near | call.forced
        least = (share * anyway).sum(-1, keepdim=True) * math.exp(
            max(-700.0, min(700.0, -self.theta))
        )
        block: dict[str, Any] = {"near": near, "max_near": width, **valid(call)}
        n_q, n_k = q.shape[2], k.shape[2]
        table = ops.choose_blocks(share, call.keep, n_q, n_k, *sizes, **block)
        mask = table.to_mask() & ((share >= least) | anyway)
        table = BlockTable.from_mask(mask, *sizes, n_q, n_k, table.indices.shape[-1])
        return with_mass(table, q, k, call, sizes, rules.get("mass", 0.0)), None


def _rounded(x: Tensor, bits: int) -> Tensor:
    """x with each token rounded to so many bits of its largest entry."""
    step = x.detach().float().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, (x.detach() / step).round() * step, 0.0).to(x.dtype)
