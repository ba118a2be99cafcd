"""Block-sparse attention, naively: a dense softmax under the table's mask."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel.table import BlockTable


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ...,
    return_lse: Literal[False] = ..., kv_len: int | Tensor | None = ..., *,
    dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ..., *,
    return_lse: Literal[True], kv_len: int | Tensor | None = ...,
    dtype: torch.dtype | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ...,
    return_lse: bool = ..., kv_len: int | Tensor | None = ..., *,
    dtype: torch.dtype | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    return_lse: bool = False,
    kv_len: int | Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.block_sparse_attention; `dtype` is that of the arithmetic and of the result
    (None: float32 arithmetic, result in q.dtype)."""
    result, work = dtype or q.dtype, dtype or torch.float32
    mask = token_mask(table, kv_len)
    valid = mask.any(2)[..., None]
    q, k, v = q.to(work), k.to(work).where(valid, 0), v.to(work).where(valid, 0)
    scores = (q @ k.mT * (scale or q.shape[-1] ** -0.5)).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().where(mask, 0)
    out = (weights @ v).to(result)
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
    """dq, dk, dv; P = exp(s − LSE), dS = P ∘ (dO vᵀ − rowsum(dO ∘ O) + dLSE)."""
    mask, scale = token_mask(table, kv_len), scale or q.shape[-1] ** -0.5
    valid = mask.any(2)[..., None]
    fq, fk, fv = q.float(), k.float().where(valid, 0), v.float().where(valid, 0)
    p = (fq @ fk.mT * scale - lse.float()[..., None]).exp().where(mask, 0)
    grad = grad_out.float()
    delta = (grad * out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    ds = p * (grad @ fv.mT - delta[..., None]) * scale
    return (ds @ fk).to(q.dtype), (ds.mT @ fq).to(k.dtype), (p.mT @ grad).to(v.dtype)


def token_mask(table: BlockTable, kv_len: int | Tensor | None = None) -> Tensor:
    """[B, H, n_q, n_k] bool: the pairs of tokens that the table keeps and kv_len allows."""
    mask = table.to_mask().repeat_interleave(table.block_q, 2)[:, :, : table.n_q]
    mask = mask.repeat_interleave(table.block_k, 3)[..., : table.n_k]
    if kv_len is None:
        return mask
    keys = torch.arange(table.n_k, device=mask.device)
    limit = torch.as_tensor(kv_len, device=mask.device).reshape(-1, 1, 1, 1)
    return mask & (keys < limit)
