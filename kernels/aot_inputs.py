"""What kernels are compiled for ahead of time: the tensors of a 480p video, without memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from dit_accel.table import BlockTable, block_count

if TYPE_CHECKING:
    from triton import JITFunction

# A kernel and its arguments.
Case: TypeAlias = "tuple[JITFunction, dict[str, object]]"

SHAPE = (1, 12, 32760)
KEPT = 26


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def table(block_q: int, block_k: int) -> BlockTable:
    """An uneven table without memory, for the shape of this file."""
    batch, heads, n = SHAPE
    rows = block_count(n, block_q)
    indices = empty(batch, heads, rows, KEPT, dtype=torch.int32)
    counts, sizes = empty(batch, heads, rows, dtype=torch.int32), (block_q, block_k, n, n)
    return BlockTable(indices, counts, *sizes, uneven=True)


def tokens(head_dim: int, dtype: torch.dtype) -> Tensor:
    """[B, H, N, D] as diffusers gives it: a transposed [B, N, H, D]."""
    batch, heads, n = SHAPE
    return empty(batch, n, heads, head_dim, dtype=dtype).transpose(1, 2)
