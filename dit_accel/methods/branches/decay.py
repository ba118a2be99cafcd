"""Linear attention that fades with distance: Lightning Attention's decay (arXiv 2405.17381), which
is one of time there, as a function of where blocks lie in the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dit_accel.forward.order import Grid
from dit_accel.machine import cached_tensors
from dit_accel.methods.branches.base import Branch
from dit_accel.methods.selectors.near import own_blocks
from dit_accel.methods.selectors.window import centres, placed
from dit_accel.methods.trained import Parts, of_heads
from dit_accel.table import block_count

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Decay(Branch):
    """w_nm = e^(−a·d_nm): a, rates of each head in frames, rows and columns; d_nm, how many of them
    lie between the centres of the blocks; 0 for a query block's own blocks and for text.

    a = 0 is the plain branch, and training starts there; a → ∞ leaves the own blocks and the text.
    A row's largest weight is 1: a negative rate, which looks far away, overflows nothing.
    """

    name: ClassVar[str] = "decay"
    description: ClassVar[str] = "a learned decay of each head with the 3-D distance of blocks"
    paper: ClassVar[str] = "arXiv 2405.17381 (Lightning Attention)"
    weighs: ClassVar[bool] = True
    placed: ClassVar[bool] = True

    @property
    def tensors(self) -> dict[str, str]:
        return {"decay": "the rates by frame, row and column [H, 3]"}

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        return {"decay": torch.zeros(heads, 3)}

    def blocks(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], parts: Parts
    ) -> Tensor | None:
        if "decay" not in parts:
            return None
        rates = of_heads(parts["decay"], call, q, "decay", 3).float()
        grid, at = placed(f"branch {self.name}", q, k, call)
        far = distances(grid, at, k.shape[2], sizes, call.index, q.device)
        falls = -torch.einsum("ha,anm->hnm", rates, far)
        return (falls - falls.detach().amax(-1, keepdim=True)).exp()[None]


@cached_tensors(8)
def distances(
    grid: Grid,
    at: tuple[int, int, int],
    n_keys: int,
    sizes: tuple[int, int],
    index: Tensor | None,
    device: torch.device,
) -> Tensor:
    """float32 [3, Mq, Mk]: tokens between the centres of blocks on each axis; 0 for own blocks and
    those that hold text. at: see selectors.window.placed; index: the order of the tokens."""
    n_q, first, start = at
    n = grid[0] * grid[1] * grid[2]
    cells = torch.arange(n) if index is None else index.cpu()
    space = grid[1] * grid[2]
    points = torch.stack([cells // space, cells % space // grid[2], cells % grid[2]], -1).double()
    rows = slice(start // sizes[0], start // sizes[0] + block_count(n_q, sizes[0]))
    q, k = centres(points, 0, n, sizes[0])[rows], centres(points, first, n_keys, sizes[1])
    far = (q[:, None] - k[None]).abs().permute(2, 0, 1)
    low, high = own_blocks(n_q, sizes[0], sizes[1], first + start)
    block, tokens = torch.arange(len(k)), torch.arange(n_keys)
    near = (block >= low) & (block <= high)
    near[:, tokens[(tokens < first) | (tokens >= first + n)] // sizes[1]] = True
    return far.masked_fill(near, 0).float().to(device)
