"""Rectified attention on CUDA, in Triton: r and C from the block means, r·O + C in the epilogue.

    a_nm = softmax_m(scale·q̄_n·k̄_m + log|m|)
    r_n = Σ_{m exact} a_nm,  C_n = Σ_{m not exact} a_nm v̄_m

Exact are the table's blocks and, with GAPR, the blocks whose gain |q̄·k̄| is at most the error
|mean|q−q̄|·k̄| + |q̄·mean|k−k̄||. No matrix of Mq × Mk scores is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.triton import attend, supports
from dit_accel.kernels.block_table.means import block_means, kept_map
from dit_accel.kernels.block_table.triton import MEAN_TILE, load_means
from dit_accel.kernels.launch import capability_of, find, padded, run
from dit_accel.kernels.tiles import key_limits, log2_scale
from dit_accel.table import BlockMeans, BlockTable, block_count

__all__ = ["rectified_attention", "supports"]


@triton.jit(do_not_specialize=["n_k", "m_q", "m_k"])
def _rectified_attention_coefficients_fwd_kernel(
    q, k, v, q_far, k_far, kept, kv_len, ratio, shift, n_k, m_q, m_k, d, scale,
    BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    o_q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    o_v = tl.arange(0, BLOCK_D)
    b_c = tl.zeros([TILE_Q, BLOCK_D], tl.float32)
    b_m = tl.full([TILE_Q], -float("inf"), tl.float32)
    b_l = tl.zeros([TILE_Q], tl.float32)
    b_r = tl.zeros([TILE_Q], tl.float32)
    for i in range(0, tl.cdiv(n_valid, BLOCK_K), TILE_K):
        o_k = i + tl.arange(0, TILE_K)
        b_v = load_means(v + i_bh * m_k * d, o_k, o_v, m_k, d)
        m_x = (o_q[:, None] < m_q) & (o_k[None, :] < m_k)
        p_x = kept + (i_bh * m_q + o_q[:, None]) * m_k + o_k[None, :]
        m_exact = tl.load(p_x, mask=m_x, other=1) != 0
        b_g = tl.zeros([TILE_Q, TILE_K], tl.float32)
        b_eq = tl.zeros([TILE_Q, TILE_K], tl.float32)
        b_ek = tl.zeros([TILE_Q, TILE_K], tl.float32)
        for i_d in range(0, d, TILE_D):
            o_d = i_d + tl.arange(0, TILE_D)
            b_q = load_means(q + i_bh * m_q * d, o_q, o_d, m_q, d)
            b_k = load_means(k + i_bh * m_k * d, o_k, o_d, m_k, d)
            # [TQ, TD] @ [TD, TK] -> [TQ, TK]
            b_g = tl.dot(b_q, tl.trans(b_k), b_g, input_precision=PRECISION)
            if q_far is not None:
                b_qf = load_means(q_far + i_bh * m_q * d, o_q, o_d, m_q, d)
                b_kf = load_means(k_far + i_bh * m_k * d, o_k, o_d, m_k, d)
                b_eq = tl.dot(b_qf.to(tl.float32), tl.trans(b_k), b_eq, input_precision="tf32")
                b_ek = tl.dot(b_q, tl.trans(b_kf.to(tl.float32)), b_ek, input_precision="tf32")
        if q_far is not None:
            m_exact = m_exact | (tl.abs(b_g) <= tl.abs(b_eq) + tl.abs(b_ek))
        b_size = (n_valid - o_k * BLOCK_K).to(tl.float32)
        b_bias = tl.log2(tl.clamp(b_size, 1.0, BLOCK_K))
        b_s = tl.where(b_size[None, :] > 0, b_g * scale + b_bias[None, :], -float("inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_a = tl.exp2(b_m - b_new)
        b_l = b_l * b_a + tl.sum(b_p, 1)
        b_r = b_r * b_a + tl.sum(tl.where(m_exact, b_p, 0.0), 1)
        # [TQ, TK] @ [TK, D] -> [TQ, D]
        b_p = tl.where(m_exact, 0.0, b_p)
        b_c = tl.dot(b_p, b_v, b_c * b_a[:, None], input_precision="tf32")
        b_m = b_new
    b_l = tl.where(b_l > 0, b_l, 1.0)
    tl.store(ratio + i_bh * m_q + o_q, b_r / b_l, mask=o_q < m_q)
    p_c = shift + (i_bh * m_q + o_q[:, None]) * d + o_v[None, :]
    tl.store(p_c, b_c / b_l[:, None], mask=(o_q[:, None] < m_q) & (o_v[None, :] < d))


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
    """See ops.rectified_attention; the output has the layout of q."""
    out = torch.empty_like(q)
    rectify = coefficients(q, k, v, table, scale, gapr, kv_len, means)
    launch = find("forward", capability_of(q), q.shape[-1], table.block_q)
    attend(q, k, v, out, None, table, launch, scale, kv_len, rectify=rectify)
    return out


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
    """r [B, H, Mq] and C [B, H, Mq, D], float32."""
    if means is None:
        (q_mean, q_far), (k_mean, k_far) = (
            block_means(q, table.block_q, spread=gapr),
            block_means(k, table.block_k, kv_len, spread=gapr),
        )
        means = BlockMeans(q_mean, k_mean, q_far, k_far)
    ratio = means.q.new_empty(means.q.shape[:3])
    shift = torch.empty_like(means.q)
    launch = find("coefficients", capability_of(q), q.shape[-1], table.block_q)
    limits = key_limits(k, kv_len)
    limits.pop("PADDED")
    arguments = {
        "q": means.q, "k": means.k, "v": block_means(v, table.block_k, kv_len)[0],
        "q_far": means.q_far if gapr else None,
        "k_far": means.k_far if gapr else None,
        "kept": kept_map(table), "ratio": ratio, "shift": shift, **limits, "m_q": means.q.shape[2],
        "m_k": means.k.shape[2], "d": q.shape[-1], "scale": log2_scale(scale, q),
        "BLOCK_K": table.block_k,
        "TILE_Q": launch.tile, "TILE_K": launch.tile, "TILE_D": MEAN_TILE,
        "BLOCK_D": padded(q.shape[-1]),
        "PRECISION": launch.precision,
    }  # fmt: skip
    grid = (block_count(means.q.shape[2], launch.tile), q.shape[1], q.shape[0])
    run(_rectified_attention_coefficients_fwd_kernel, grid, arguments, launch)
    return ratio, shift
