"""Rectified attention in plain torch: r and C are one small attention between block means."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.torch import block_sparse_attention
from dit_accel.kernels.block_table.torch import block_means, block_sizes, block_spreads
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
) -> Tensor:
    """See ops.rectified_attention."""
    out = block_sparse_attention(q, k, v, table, scale, kv_len=kv_len)
    return rectify(out, *coefficients(q, k, v, table, scale, gapr, kv_len, means), table.block_q)


def rectify(out: Tensor, ratio: Tensor, shift: Tensor, block_q: int) -> Tensor:
    """r · O + C for O [B, H, N_q, D], with r [B, H, Mq] and C [B, H, Mq, D] of each query block."""
    full = out.shape[2] // block_q
    ratio, shift = ratio[..., None, None], shift[..., None, :]
    blocks = out[:, :, : full * block_q].unflatten(2, (full, block_q))
    parts = [torch.addcmul(shift[:, :, :full], ratio[:, :, :full], blocks.float()).flatten(2, 3)]
    if full * block_q < out.shape[2]:
        last = out[:, :, full * block_q :].float()
        parts.append(torch.addcmul(shift[:, :, -1], ratio[:, :, -1], last))
    return (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).to(out.dtype)


def coefficients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    gapr: bool = True,
    kv_len: int | Tensor | None = None,
    means: BlockMeans | None = None,
) -> tuple[Tensor, Tensor]:
    """r [B, H, Mq] and C [B, H, Mq, D], float32 and differentiable.

    a = softmax_m(scale · q̄_n·k̄_m + ln|m|),  r_n = Σ_{exact} a_nm,  C_n = Σ_{other} a_nm v̄_m;
    exact are the table's blocks and, with gapr, those whose gain is at most their error. Not
    differentiable in q̄ and k̄ where `means` give them.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    vm = block_means(v, table.block_k, kv_len)
    blocks = vm.shape[2]
    if means is None:
        qm, km = block_means(q, table.block_q), block_means(k, table.block_k, kv_len)
    else:
        qm, km = means.q, means.k[:, :, :blocks]
    sizes = block_sizes(k.shape[2], table.block_k, kv_len, k.device)[..., :blocks]
    scores = qm @ km.mT  # [B, H, Mq, Mk]
    a = (scores * scale + sizes.log()[:, :, None]).softmax(-1)
    exact = table.to_mask()[..., :blocks]
    if gapr:
        if means is None or means.q_far is None or means.k_far is None:
            q_far = block_spreads(q, qm, table.block_q).to(q.dtype)
            k_far = block_spreads(k, km, table.block_k, kv_len).to(k.dtype)
        else:
            q_far, k_far = means.q_far, means.k_far[:, :, :blocks]
        error = (q_far.float() @ km.mT).abs() + (qm @ k_far.float().mT).abs()
        exact = exact | (scores.abs() <= error)
    return a.where(exact, 0).sum(-1), a.where(~exact, 0) @ vm
