"""Block-sparse attention in eight bits in plain torch: what it does to the result, not its speed.

q, k and v are rounded as the kernel rounds them, then multiplied in float32; the weights are not
rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.torch import block_sparse_attention
from dit_accel.kernels.int8_attention.reference import GROUP, rounded
from dit_accel.table import BlockTable


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    return_lse: bool = False,
    kv_len: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.block_sparse_attention with precision="int8"."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = min(GROUP, table.block_k)
    q8, k8, v8, mean = rounded(q.float(), k, v, kv_len, group, torch.float8_e4m3fn)
    out, lse = block_sparse_attention(q8, k8, v8, table, scale, True, kv_len)
    lse = lse + scale * (q.float() * mean).sum(-1)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)
