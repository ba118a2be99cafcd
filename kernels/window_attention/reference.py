"""Dense and windowed attention, naively: two softmaxes."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.reference import block_sparse_attention
from dit_accel.table import BlockTable


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output over all keys, output over the table's, and their LSEs; see ops.window_attention."""
    sizes = (table.block_q, table.block_k, table.n_q, table.n_k)
    whole = BlockTable.from_mask(torch.ones_like(table.to_mask()), *sizes)
    (full, full_lse), (window, window_lse) = (
        block_sparse_attention(q, k, v, t, scale, return_lse=True, kv_len=kv_len, dtype=dtype)
        for t in (whole, table)
    )
    return full, window, full_lse, window_lse
