"""Sparse-linear attention, naively: every pair of tokens, and a mask (arXiv 2509.24006)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.reference import block_sparse_attention, token_mask
from dit_accel.kernels.sparse_linear_attention.features import (
    EPS,
    features,
    features_backward,
    key_mask,
)
from dit_accel.table import BlockTable


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    feature_map: str = "softmax",
    excluded: BlockTable | None = None,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See ops.sparse_linear_attention; `excluded` as in `linear_branch`."""
    base = block_sparse_attention(q, k, v, table, scale, kv_len=kv_len, dtype=dtype)
    if weight is None:
        return base
    return linear_branch(base, q, k, v, excluded, weight, bias, feature_map, kv_len, dtype=dtype)


def linear_branch(
    base: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    excluded: BlockTable | None,
    weight: Tensor,
    bias: Tensor | None = None,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
    into: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """base + (A v / (rowsum A + ε)) Wᵀ + b, A = φ(q)φ(k)ᵀ without the blocks of `excluded`.

    base, q [B, H, N_q, D], k, v [B, H, N_k, D], weight [D, D], bias [D] or None.
    into: where the result goes.
    """
    result, work = dtype or base.dtype, dtype or torch.float32
    a, fv, *_ = _weights(q, k, v, excluded, feature_map, kv_len, work)
    out = (a / (a.sum(-1, keepdim=True) + EPS)) @ fv @ weight.to(work).mT
    out = out if bias is None else out + bias.to(work)
    out = (base.to(work) + out).to(result)
    return out if into is None else into.copy_(out)


def linear_branch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    excluded: BlockTable | None,
    weight: Tensor,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dW of `linear_branch` (base's gradient is grad, that of bias its sum)."""
    a, fv, fq, fk, mask = _weights(q, k, v, excluded, feature_map, kv_len, torch.float32)
    total = a.sum(-1, keepdim=True) + EPS
    p, grad = a / total, grad.float()
    du = grad @ weight.float()
    dw = (grad.mT @ (p @ fv)).sum((0, 1))
    dp = du @ fv.mT
    da = ((dp - (dp * p).sum(-1, keepdim=True)) / total).where(mask, 0)
    valid = key_mask(k, kv_len)
    dq = features_backward(da @ fk, q.float(), feature_map)
    dk = features_backward((da.mT @ fq).where(valid, 0), k.float().where(valid, 0), feature_map)
    dv = (p.mT @ du).to(v.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv, dw.to(weight.dtype)


def _weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    excluded: BlockTable | None,
    feature_map: str,
    kv_len: int | Tensor | None,
    work: torch.dtype,
) -> tuple[Tensor, ...]:
    """A, v, φ(q), φ(k) and the mask of A."""
    valid = key_mask(k, kv_len)
    mask = valid.mT.expand(*q.shape[:3], k.shape[2])
    if excluded is not None:
        mask = mask & ~token_mask(excluded)
    fq, fk = (features(x.to(work), feature_map) for x in (q, k))
    fk, fv = fk.where(valid, 0), v.to(work).where(valid, 0)
    return (fq @ fk.mT).where(mask, 0), fv, fq, fk, mask


def weighted_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "softmax",
    keys: Tensor | None = None,
    blocks: Tensor | None = None,
    sizes: tuple[int, int] = (64, 64),
    rms: bool = False,
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """See ops.weighted_linear_attention: A_ij = w_nm g_j φ(q_i)·φ(k_j) of every pair of tokens."""
    valid = key_mask(k, kv_len)
    k, v = (x.float().where(valid, 0) for x in (k, v))
    a = features(q.float(), feature_map) @ features(k, feature_map).mT
    a = a if keys is None else a * keys.float()[:, :, None]
    if blocks is not None:
        rows = blocks.float().repeat_interleave(sizes[0], 2)[:, :, : q.shape[2]]
        a = a * rows.repeat_interleave(sizes[1], 3)[..., : k.shape[2]]
    a = a.where(valid.mT, 0)
    out = a @ v
    size = out.square().mean(-1, keepdim=True).add(EPS**2).sqrt()
    return out / (size if rms else a.sum(-1, keepdim=True) + EPS)
