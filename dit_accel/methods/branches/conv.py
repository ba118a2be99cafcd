"""A depth-wise convolution of the values beside attention: SLAB (arXiv 2405.11582), RCMHA, and what
RALA and BiFormer call local enhancement."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.forward.order import Grid, inverse
from dit_accel.methods.branches.base import Branch
from dit_accel.methods.selectors.window import placed
from dit_accel.methods.trained import Parts, learns

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Conv(Branch):
    """C_i = Σ_δ c_δ ⊙ v at i + δ of the picture, nothing beyond its border; c of each channel, the
    same for all heads. c = 0 adds nothing, and training starts there.

    Args:
        size: (t, h, w) of the kernel, each odd.

    Raises ValueError for another size.
    """

    size: Grid = (3, 5, 5)

    name: ClassVar[str] = "conv"
    description: ClassVar[str] = "a depth-wise convolution of the values beside attention"
    paper: ClassVar[str] = "arXiv 2405.11582 (SLAB)"
    placed: ClassVar[bool] = True
    beside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(n > 0 and n % 2 for n in self.size):
            raise ValueError(f"a convolution has three odd sizes (t, h, w), not {self.size}")

    @property
    def tensors(self) -> dict[str, str]:
        return {"conv": f"the kernel of each channel [D, {', '.join(map(str, self.size))}]"}

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        return {"conv": torch.zeros(head_dim, *self.size)}

    def idle(self, parts: Parts) -> bool:
        return not learns(parts, "conv")

    def addend(self, q: Tensor, v: Tensor, call: Call, parts: Parts) -> Tensor | None:
        if "conv" not in parts:
            return None
        kernel, shape = parts["conv"], (v.shape[3], *self.size)
        if kernel.shape != shape:
            raise ValueError(
                f"conv of layer {call.layer} is {list(kernel.shape)}, but this model and "
                f"branch={self} make it {list(shape)}"
            )
        grid, (n_q, first, start) = placed(f"branch {self.name}", q, v, call)
        x = v[:, :, first : first + prod(grid)]
        index = None if call.index is None else call.index.to(v.device)
        x = x if index is None else x.index_select(2, inverse(index))
        x = x.transpose(2, 3).flatten(0, 1).unflatten(2, grid)
        x = F.conv3d(x, kernel.to(x.dtype)[:, None], padding="same", groups=shape[0])
        x = x.flatten(2).unflatten(0, v.shape[:2]).transpose(2, 3)
        rows = slice(start, start + n_q)
        return x[:, :, rows] if index is None else x.index_select(2, index[rows])
