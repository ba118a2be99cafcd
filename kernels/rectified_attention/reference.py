"""Rectified attention, naively: r and C from the masked softmax of the block means."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.reference import block_sparse_attention
from dit_accel.kernels.block_table.reference import block_means, block_spreads
from dit_accel.table import BlockMeans, BlockTable


def rectified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    gapr: bool = True,
    kv_len: int | Tensor | None = None,
    means: BlockMeans | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See ops.rectified_attention; `dtype` as in block_sparse_attention's reference."""
    result, work = dtype or q.dtype, dtype or torch.float32
    limits = torch.as_tensor(table.n_k if kv_len is None else kv_len).expand(q.shape[0]).tolist()
    sparse = block_sparse_attention(q, k, v, table, scale, kv_len=kv_len, dtype=work)
    out = torch.zeros_like(sparse)
    kept, scale = table.to_mask(), scale or q.shape[-1] ** -0.5
    sides = (q.to(work), table.block_q, [table.n_q] * len(q)), (k.to(work), table.block_k, limits)
    q_mean, k_mean = (means.q, means.k) if means else (block_means(*side) for side in sides)
    if means is None or means.q_far is None or means.k_far is None:
        q_far, k_far = (block_spreads(*side) for side in sides)
    else:
        q_far, k_far = means.q_far, means.k_far
    q_far, k_far = (x if dtype else x.to(q.dtype).to(work) for x in (q_far, k_far))
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        if limits[b] == 0:
            continue
        keys = k[b, h, : limits[b]].to(work).split(table.block_k)
        values = v[b, h, : limits[b]].to(work).split(table.block_k)
        vm = torch.stack([x.mean(0) for x in values])
        km, spread = k_mean[b, h, : len(keys)], k_far[b, h, : len(keys)]
        sizes = torch.tensor([len(x) for x in keys], dtype=work, device=q.device)
        for n, block in enumerate(q[b, h].to(work).split(table.block_q)):
            qm = q_mean[b, h, n]
            a = (km @ qm * scale + sizes.log()).softmax(-1)
            exact = kept[b, h, n, : len(keys)]
            if gapr:
                error = (km @ q_far[b, h, n]).abs() + (spread @ qm).abs()
                exact = exact | ((km @ qm).abs() <= error)
            rows = slice(n * table.block_q, n * table.block_q + len(block))
            out[b, h, rows] = sparse[b, h, rows] * a[exact].sum() + a[~exact] @ vm[~exact]
    return out.to(result)
