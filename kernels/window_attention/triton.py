"""Dense attention and the window's part of it on CUDA: the block-sparse kernel over two tables.

One pass that stores what it has after the window's blocks reads no key twice, but held to that
order it took 35 ms where two launches of the tuned kernel need half (benchmarks/kernels-log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.triton import block_sparse_attention, supports
from dit_accel.table import BlockTable, block_count

__all__ = ["supports", "window_attention"]

# The blocks of the dense pass: those of the fastest row of the launch table.
_BLOCK_Q, _BLOCK_K = 128, 64


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output over all keys, output over the table's, and their LSEs; see ops.window_attention."""
    (full, full_lse), (window, window_lse) = (
        block_sparse_attention(q, k, v, t, scale, return_lse=True, kv_len=kv_len)
        for t in (every_block(q, k), table)
    )
    return full, window, full_lse, window_lse


def every_block(q: Tensor, k: Tensor) -> BlockTable:
    """The table of dense attention; its rows are one row in memory."""
    rows, blocks = block_count(q.shape[2], _BLOCK_Q), block_count(k.shape[2], _BLOCK_K)
    indices = torch.arange(blocks, dtype=torch.int32, device=q.device)
    counts = torch.full((*q.shape[:2], rows), blocks, dtype=torch.int32, device=q.device)
    indices = indices.expand(*counts.shape, blocks)
    return BlockTable(indices, counts, _BLOCK_Q, _BLOCK_K, q.shape[2], k.shape[2])
