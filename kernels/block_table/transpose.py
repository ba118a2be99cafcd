"""The table by key blocks, for gradients of keys and values, on CUDA in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import find, run
from dit_accel.table import BlockTable, block_count

LAUNCH = find("rows", 80, 128, 128)


@triton.jit(do_not_specialize=["width", "m_pad"])
def _kept_map_fwd_kernel(indices, counts, kept, width, m_pad, BLOCK: tl.constexpr):
    p_kept = kept + tl.program_id(0).to(tl.int64) * m_pad
    p_row = indices + tl.program_id(0).to(tl.int64) * width
    n_kept = tl.load(counts + tl.program_id(0))
    o_i = tl.arange(0, BLOCK)
    for i in range(0, m_pad, BLOCK):
        tl.store(p_kept + i + o_i, tl.zeros([BLOCK], tl.uint8), mask=i + o_i < m_pad)
    tl.debug_barrier()  # the ones come after the zeros
    for i in range(0, n_kept, BLOCK):
        b_i = tl.load(p_row + i + o_i, mask=i + o_i < n_kept, other=0)
        tl.store(p_kept + b_i, tl.full([BLOCK], 1, tl.uint8), mask=i + o_i < n_kept)


@triton.jit(do_not_specialize=["m_q", "m_k", "m_pad"])
def _transpose_table_fwd_kernel(
    kept, starts, rows, m_q, m_k, m_pad, TILE_Q: tl.constexpr, TILE_K: tl.constexpr
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    o_k = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    b_at = tl.load(starts + i_bh * m_k + o_k, mask=o_k < m_k, other=0) - 1
    for i in range(0, m_q, TILE_Q):
        o_q = i + tl.arange(0, TILE_Q)
        m_x = (o_q[:, None] < m_q) & (o_k[None, :] < m_k)
        p_x = kept + (i_bh * m_q + o_q[:, None]) * m_pad + o_k[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0).to(tl.int32)
        b_to = b_at[None, :] + tl.cumsum(b_x, 0)
        tl.store(rows + b_to, o_q[:, None] + tl.zeros_like(b_x), mask=b_x != 0)
        b_at += tl.sum(b_x, 0)


def kept_map(table: BlockTable) -> Tensor:
    """[B, H, Mq, Mk] uint8, 1 where the table keeps the block."""
    m = table.key_blocks
    kept = table.indices.new_empty((*table.counts.shape, m), dtype=torch.uint8)
    arguments = {
        "indices": table.indices.contiguous(), "counts": table.counts.contiguous(), "kept": kept,
        "width": table.indices.shape[-1], "m_pad": m, "BLOCK": 512,
    }  # fmt: skip
    run(_kept_map_fwd_kernel, (table.counts.numel(), 1, 1), arguments, LAUNCH)
    return kept


def transpose_table(table: BlockTable) -> tuple[Tensor, Tensor, Tensor]:
    """The query blocks that read each key block: starts int64 and counts int32 [B, H, Mk], and the
    flat int32 list of query blocks, ascending for each key block."""
    kept = kept_map(table)
    counts = kept.sum(2, dtype=torch.int32)
    starts = counts.flatten().cumsum(0).view_as(counts) - counts
    rows = table.indices.new_empty(table.indices.numel())
    arguments = {
        "kept": kept, "starts": starts, "rows": rows, "m_q": kept.shape[2], "m_k": kept.shape[3],
        "m_pad": kept.shape[3], "TILE_Q": 128, "TILE_K": 16,
    }  # fmt: skip
    grid = (block_count(kept.shape[3], 16), kept.shape[0] * kept.shape[1], 1)
    run(_transpose_table_fwd_kernel, grid, arguments, LAUNCH)
    return starts, counts, rows
