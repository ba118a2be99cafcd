"""What either of two selectors chooses: scores beside a static set, such as "sub & window(t=1)"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from dit_accel.methods.selectors.base import Chosen, Fixed, Selector
from dit_accel.methods.trained import Parts

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Both(Selector):
    """The union of two choices; more than `keep` is read where they differ.

    A fixed set that comes second stands beside the scores of the first in one choice; what else
    comes second is chosen by itself, at the same keep.
    """

    first: Selector
    second: Selector

    name: ClassVar[str] = "&"
    description: ClassVar[str] = "what either of two selectors chooses"

    @property
    def tensors(self) -> dict[str, str]:
        return self.first.tensors | self.second.tensors

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        sizes = (heads, head_dim, width)
        return self.first.fresh(*sizes) | self.second.fresh(*sizes)

    def idle(self, parts: Parts) -> bool:
        return self.first.idle(parts) and self.second.idle(parts)

    @property
    def placed(self) -> bool:
        return self.first.placed or self.second.placed

    @property
    def reads_values(self) -> bool:
        return self.first.reads_values or self.second.reads_values

    @property
    def counted(self) -> bool:
        return self.first.counted or self.second.counted

    @property
    def files(self) -> tuple[Path, ...]:
        return self.first.files + self.second.files

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any
    ) -> Chosen:
        """The first one's choice by these rules, and what the second one adds."""
        if not isinstance(self.second, Fixed):
            table, means = self.first.choose(q, k, call, sizes, **rules)
            return table.union(self.second.choose(q, k, call, sizes)[0]), means
        mask, width = self.second.mask(q, k, call, sizes)
        if rules.get("near") is not None:
            mask, width = mask | rules["near"], width + rules.get("max_near", 0)
        rules |= {"near": mask, "max_near": width}
        return self.first.choose(q, k, call, sizes, **rules)

    def __str__(self) -> str:
        return f"{self.first} & {self.second}"
