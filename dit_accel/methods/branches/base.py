"""What a branch is: a frozen dataclass that says what the linear branch of SLA weighs, by what it
is divided, and what stands beside attention; with trained tensors in each layer.

    O = O_sparse + γ ⊙ (O_lin Wᵀ) + b + C,   O_lin,i = Σ_m w_nm Σ_{j∈m} g_j φ(q_i)·φ(k_j) v_j / N_i
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dit_accel.methods.trained import Parts, Trained

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Branch(Trained):
    """Base of all branches, and the plain one: w = g = γ = 1, C = 0, N_i = Σ of the weights + ε.

    Every tensor starts where the branch is the plain one; `idle` is said of W = b = 0.
    """

    name: ClassVar[str] = "plain"
    description: ClassVar[str] = "the linear branch as it is"
    paper: ClassVar[str] = "arXiv 2509.24006 (SLA)"

    weighs: ClassVar[bool] = False  # has `keys` or `blocks`
    placed: ClassVar[bool] = False  # looks where tokens lie in the picture
    gated: ClassVar[bool] = False  # has a γ, from the attention's input
    rms: ClassVar[bool] = False  # N_i is the root mean square of what it divides
    all_queries: ClassVar[bool] = False  # looks at all queries at once
    beside: ClassVar[bool] = False  # has a C
    replaces: ClassVar[bool] = False  # has a `linear` of its own
    all_keys: ClassVar[bool] = False  # which knows no excluded blocks

    @property
    def members(self) -> Sequence[Branch]:
        """The branches that it is made of."""
        return (self,)

    def has(self, flag: str) -> bool:
        """Is it so, `weighs`, `placed` …, with any of its members?"""
        return any(getattr(member, flag) for member in self.members)

    @property
    def alters(self) -> bool:
        """Is the linear branch another than SLA's own?"""
        return any(map(self.has, ("weighs", "gated", "rms", "replaces")))

    def keys(self, q: Tensor, k: Tensor, call: Call, parts: Parts) -> Tensor | None:
        """g ≥ 0 of the keys k [B, H, N_k, D], [B, H, N_k], or None. What follows the valid keys is
        zero in k, and what it gets does not count."""
        return None

    def blocks(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], parts: Parts
    ) -> Tensor | None:
        """w ≥ 0 of query blocks and key blocks of these sizes, [1 or B, H, Mq, Mk], or None."""
        return None

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call,
        feature_map: str,
        held: tuple[Tensor | None, tuple[int, int]],
        parts: Parts,
    ) -> Tensor | None:
        """O_lin [B, H, N_q, D] float32 in place of SLA's, or None.

        held: the pairs of blocks [B, H, Mq, Mk] that it may read (None: all), and their sizes.
        """
        return None

    def gate(self, hidden: Tensor, heads: int, parts: Parts) -> Tensor | None:
        """γ [B, N, H, D] of the attention's input [B, N, C], or None. heads: all of the layer."""
        return None

    def addend(self, q: Tensor, v: Tensor, call: Call, parts: Parts) -> Tensor | None:
        """C [B, H, N_q, D] of the queries q and the values of all keys, or None."""
        return None


def product(found: Iterable[Tensor | None]) -> Tensor | None:
    """The product of those that are there."""
    there = [x for x in found if x is not None]
    return reduce(mul, there) if there else None
