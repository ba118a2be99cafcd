"""Several branches as one, such as "decay & rms": weights are multiplied, what stands beside is
added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dit_accel.methods.branches.base import Branch, product
from dit_accel.methods.trained import Parts

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Several(Branch):
    """The branches of a text "A & B". Raises ValueError where one of them comes twice, and where
    one weighs what another one replaces."""

    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        names = [branch.name for branch in self.branches]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"branch {self} has {name} twice: name each once")
        replacing = [branch.name for branch in self.branches if branch.replaces]
        if len(replacing) > 1 or (replacing and self.has("weighs")):
            raise ValueError(
                f"{replacing[0]} is in place of the linear branch, so that nothing of it can be "
                f"weighed: take it with rms or conv, not {self}"
            )

    @property
    def members(self) -> Sequence[Branch]:
        return self.branches

    @property
    def tensors(self) -> dict[str, str]:
        return {name: x for branch in self.branches for name, x in branch.tensors.items()}

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        found = (branch.fresh(heads, head_dim, width) for branch in self.branches)
        return {name: x for parts in found for name, x in parts.items()}

    def idle(self, parts: Parts) -> bool:
        return all(branch.idle(parts) for branch in self.branches)

    def keys(self, q: Tensor, k: Tensor, call: Call, parts: Parts) -> Tensor | None:
        return product(branch.keys(q, k, call, parts) for branch in self.branches)

    def blocks(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], parts: Parts
    ) -> Tensor | None:
        return product(branch.blocks(q, k, call, sizes, parts) for branch in self.branches)

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
        found = [x.linear(q, k, v, call, feature_map, held, parts) for x in self.branches]
        return next((x for x in found if x is not None), None)

    def gate(self, hidden: Tensor, heads: int, parts: Parts) -> Tensor | None:
        return product(branch.gate(hidden, heads, parts) for branch in self.branches)

    def addend(self, q: Tensor, v: Tensor, call: Call, parts: Parts) -> Tensor | None:
        found = [branch.addend(q, v, call, parts) for branch in self.branches]
        there = [x for x in found if x is not None]
        return sum(there[1:], there[0]) if there else None

    def __str__(self) -> str:
        return " & ".join(map(str, self.branches))
