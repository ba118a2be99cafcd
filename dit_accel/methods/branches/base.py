"""What a branch is: a frozen dataclass that says what the linear branch of SLA weighs, by what it
is divided, and what stands beside attention; with trained tensors in each layer.

    O = O_sparse + γ ⊙ (O_lin Wᵀ) + b + C,   O_lin,i = Σ_m w_nm Σ_{j∈m} g_j φ(q_i)·φ(k_j) v_j / N_i
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dit_accel.methods.texts import Named

if TYPE_CHECKING:
    from dit_accel.methods.base import Call

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Branch(Named):
    """Base of all branches, and the plain one: w = g = γ = 1, C = 0, N_i = Σ of the weights + ε.

    Every tensor starts where the branch is the plain one. Those with a number for each head hold
    all heads of the layer; a call may have some of them (Call.heads).
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
        return any(map(self.has, ("weighs", "gated", "rms")))

    @property
    def parts(self) -> dict[str, str]:
        """Names of a layer's tensors → what they are."""
        return {}

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        """A layer's tensors before training; see Learned.fresh."""
        return {}

    def idle(self, parts: Parts) -> bool:
        """Whether it adds nothing where W = 0 and b = 0."""
        return True

    def keys(self, q: Tensor, k: Tensor, call: Call, parts: Parts) -> Tensor | None:
        """g ≥ 0 of the keys k [B, H, N_k, D], [B, H, N_k], or None. What follows the valid keys is
        zero in k, and what it gets does not count."""
        return None

    def blocks(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], parts: Parts
    ) -> Tensor | None:
        """w ≥ 0 of query blocks and key blocks of these sizes, [1 or B, H, Mq, Mk], or None."""
        return None

    def gate(self, hidden: Tensor, heads: int, parts: Parts) -> Tensor | None:
        """γ [B, N, H, D] of the attention's input [B, N, C], or None. heads: all of the layer."""
        return None

    def addend(self, q: Tensor, v: Tensor, call: Call, parts: Parts) -> Tensor | None:
        """C [B, H, N_q, D] of the queries q and the values of all keys, or None."""
        return None


def of_heads(x: Tensor, call: Call, q: Tensor, name: str, *rest: int) -> Tensor:
    """What a tensor [H, …] has for the heads of a call; ValueError where it is of another shape."""
    heads, shape = call.heads, tuple(x.shape[1:])
    if shape != rest or (x.shape[0] != q.shape[1] if heads is None else max(heads) >= x.shape[0]):
        wanted = [q.shape[1] if heads is None else max(heads) + 1, *rest]
        raise ValueError(
            f"{name} of layer {call.layer} is {list(x.shape)}, but this model's heads make it "
            f"{wanted}; load the weights that were trained for it"
        )
    return (x if heads is None else x[list(heads)]).to(q.device)


def product(found: Iterable[Tensor | None]) -> Tensor | None:
    """The product of those that are there."""
    there = [x for x in found if x is not None]
    return reduce(mul, there) if there else None


def learns(parts: Parts, *names: str) -> bool:
    """Is one of these tensors trained, or other than zero?"""
    found = (parts[name] for name in names if name in parts)
    return any(x.requires_grad or bool(x.any()) for x in found)
