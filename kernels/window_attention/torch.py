"""Dense attention and the window's part of it in plain torch: window, the rest, and their merge.

    O = e^(L_w − L) O_w + e^(L_r − L) O_r,   L = ln(e^L_w + e^L_r)

Each pair of tokens is computed once, as in dense attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.torch import block_sparse_attention
from dit_accel.table import BlockTable


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output over all keys, output over the table's, and their LSEs; see ops.window_attention."""
    sizes = (table.block_q, table.block_k, table.n_q, table.n_k)
    rest = BlockTable.from_mask(~table.to_mask(), *sizes)
    (window, window_lse), (other, other_lse) = (
        block_sparse_attention(q, k, v, t, scale, return_lse=True, kv_len=kv_len)
        for t in (table, rest)
    )
    lse = torch.logaddexp(window_lse, other_lse)
    # A row without a valid key has LSE −inf everywhere, and −inf − −inf is NaN.
    shift = lse.masked_fill(lse == -torch.inf, 0)
    full = window.float() * (window_lse - shift).exp()[..., None]
    full += other.float() * (other_lse - shift).exp()[..., None]
    return full.to(q.dtype), window, lse, window_lse
