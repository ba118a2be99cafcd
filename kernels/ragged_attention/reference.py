"""Attention over ragged tiles, naively: a dense softmax under the table's mask."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.table import BlockTable


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    q_bounds: Tensor,
    k_bounds: Tensor,
    scale: float | None = None,
    gate: Tensor | None = None,
    coarse: Tensor | None = None,
    whole: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops.ragged_attention; (O, LSE). `dtype` is that of the arithmetic and of the result
    (None: float32 arithmetic, result in q.dtype)."""
    result, work = dtype or q.dtype, dtype or torch.float32
    mask = token_mask(table, q_bounds, k_bounds)
    q, k, v = q.to(work), k.to(work), v.to(work)
    scores = (q @ k.mT * (scale or q.shape[-1] ** -0.5)).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().where(mask, 0) @ v
    if gate is not None and coarse is not None:
        out = out + gate.to(work) * coarse.to(work)[:, :, tile_of(q_bounds)]
    return out.to(result), lse if dtype else lse.float()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: BlockTable,
    q_bounds: Tensor,
    k_bounds: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; P = exp(s − LSE), dS = P ∘ (dO vᵀ − rowsum(dO ∘ O) + dLSE)."""
    mask, scale = token_mask(table, q_bounds, k_bounds), scale or q.shape[-1] ** -0.5
    fq, fk, fv, grad = q.float(), k.float(), v.float(), grad_out.float()
    p = (fq @ fk.mT * scale - lse.float()[..., None]).exp().where(mask, 0)
    delta = (grad * out.float()).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    ds = p * (grad @ fv.mT - delta[..., None]) * scale
    return (ds @ fk).to(q.dtype), (ds.mT @ fq).to(k.dtype), (p.mT @ grad).to(v.dtype)


def tile_means(x: Tensor, bounds: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """[B, H, M, D] float32: the mean of each tile of x [B, H, N, D]."""
    sizes = bounds.diff().tolist()
    means = torch.stack([t.mean(2) for t in x.to(dtype or torch.float32).split(sizes, 2)], 2)
    return means


def token_mask(table: BlockTable, q_bounds: Tensor, k_bounds: Tensor) -> Tensor:
    """[B, H, N_q, N_k] bool: the pairs of tokens whose tiles the table keeps."""
    return table.to_mask()[:, :, tile_of(q_bounds)][..., tile_of(k_bounds)]


def tile_of(bounds: Tensor) -> Tensor:
    """int64 [N]: the tile that each token lies in."""
    tiles = torch.arange(len(bounds) - 1, device=bounds.device)
    return tiles.repeat_interleave(bounds.diff().long())
