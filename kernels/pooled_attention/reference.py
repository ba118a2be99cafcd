"""Pooled attention, naively: a dense softmax over the keys and the mean keys, under one mask."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.reference import token_mask
from dit_accel.kernels.block_table.reference import block_means
from dit_accel.table import BlockTable


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    return_lse: bool = False,
    k_mean: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.pooled_attention; `dtype` as in block_sparse_attention's reference, k_mean
    [B, H, Mk, D] the block means of k if known."""
    result, work = dtype or q.dtype, dtype or torch.float32
    keys, values, bias, _ = _extend(k.to(work), v.to(work), table, kv_len, k_mean)
    scores = q.to(work) @ keys.mT * (scale or q.shape[-1] ** -0.5) + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().where(bias > -torch.inf, 0)
    out = (weights @ values).to(result)
    return (out, lse if dtype else lse.float()) if return_lse else out


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: those of the extended keys, spread over the tokens of each mean."""
    scale, fq, grad = scale or q.shape[-1] ** -0.5, q.float(), grad_out.float()
    keys, values, bias, pool = _extend(k.float(), v.float(), table, kv_len)
    p = (fq @ keys.mT * scale + bias - lse[..., None]).exp().where(bias > -torch.inf, 0)
    delta = (grad * out.float()).sum(-1) - (0 if grad_lse is None else grad_lse)
    ds = p * (grad @ values.mT - delta[..., None]) * scale
    dk, dv = (
        x[:, :, : table.n_k] + pool.mT @ x[:, :, table.n_k :] for x in (ds.mT @ fq, p.mT @ grad)
    )
    return (ds @ keys).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _extend(
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    kv_len: int | Tensor | None,
    k_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[k; k̄], [v; v̄], the bias of each pair (0, ln|m| or −inf), and the matrix that pools."""
    limit = torch.as_tensor(table.n_k if kv_len is None else kv_len, device=k.device)
    tokens = torch.arange(table.n_k, device=k.device)
    valid = tokens < limit.reshape(-1, 1, 1, 1)
    blocks = torch.arange(table.key_blocks, device=k.device)[:, None]
    member = (tokens // table.block_k == blocks) & valid  # [B, 1, Mk, n_k]
    sizes = member.sum(-1, keepdim=True)
    pool = member.to(k.dtype) / sizes.clamp(min=1)
    k, v = k.where(valid.mT, 0), v.where(valid.mT, 0)
    kept = torch.zeros(1, dtype=k.dtype, device=k.device).where(
        token_mask(table, kv_len), -torch.inf
    )
    skipped = ~table.to_mask().repeat_interleave(table.block_q, 2)[:, :, : table.n_q]
    tail = sizes.mT.to(k.dtype).log().where(skipped, -torch.inf)
    lengths = limit.expand(len(k)).tolist()
    k_mean = block_means(k, table.block_k, lengths) if k_mean is None else k_mean
    keys = torch.cat([k, k_mean], 2)
    values = torch.cat([v, block_means(v, table.block_k, lengths)], 2)
    return keys, values, torch.cat([kept, tail], -1), pool
