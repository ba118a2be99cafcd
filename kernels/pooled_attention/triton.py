"""Pooled attention on CUDA, in Triton: the sparse kernel, then one key per skipped block.

    logits: s_ij for kept j;  scale·q_i·k̄_m + log|m| with value v̄_m for every skipped block m

Kept and skipped blocks share one online softmax in one kernel. The means are in the dtype of k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.triton import (
    _block_sparse_attention_fwd_kernel,
    forward,
    supports,
)
from dit_accel.kernels.block_table.triton import block_means, kept_map
from dit_accel.kernels.launch import capability_of, find, run
from dit_accel.table import BlockTable

__all__ = ["pooled_attention", "supports"]


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.pooled_attention; the output has the layout of q."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    launch = find("forward", capability_of(q), q.shape[-1], table.block_q)
    pool = pooled_keys(k, v, table, kv_len, min(launch.tile, table.block_k))
    call = forward(q, k, v, out, lse, table, launch, scale, kv_len, pool=pool)
    run(_block_sparse_attention_fwd_kernel, *call)
    return out if lse is None else (out, lse)


def pooled_keys(
    k: Tensor, v: Tensor, table: BlockTable, kv_len: int | Tensor | None, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """k̄, v̄ [B, H, Mp, D] in the dtype of k, and the kept map [B, H, Mq, Mp]; Mp is Mk in whole
    tiles."""
    k_mean, v_mean = (block_means(x, table.block_k, kv_len, x.dtype, multiple=tile) for x in (k, v))
    return k_mean, v_mean, kept_map(table, tile)
