"""Rectified attention on CUDA, in Triton: r and C from the block means, r·O + C in the epilogue.

    a_nm = softmax_m(scale·q̄_n·k̄_m + log|m|)
    r_n = Σ_{m exact} a_nm,  C_n = Σ_{m not exact} a_nm v̄_m

Exact are the table's blocks and, with GAPR, the blocks whose gain |q̄·k̄| is at most the error
|mean|q−q̄|·k̄| + |q̄·mean|k−k̄||. No matrix of Mq × Mk scores is written. Of 16-bit tokens the means
of q and k are two 16-bit factors each, the mean and what rounding took from it: q̄·k̄ is then three
products, and exact to about float32; deviations, weights and v̄ have one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.triton import attend, supports
from dit_accel.kernels.block_table.means import block_means, load_means
from dit_accel.kernels.block_table.pool import kept_bits, pooled_blocks
from dit_accel.kernels.launch import Launch, capability_of, find, padded, run
from dit_accel.kernels.tiles import bit_row, key_limits, log2_scale
from dit_accel.table import BlockMeans, BlockTable, block_count

__all__ = ["rectified_attention", "supports"]

# Query blocks of a program of the coefficients: one warpgroup's rows.
TILE_Q = 64


@triton.jit(do_not_specialize=["n_k", "m_q", "m_k"])
def _rectified_attention_coefficients_fwd_kernel(
    q, q_far, k, k_rest, k_far, v, bits, kv_len, ratio, shift, n_k, m_q, m_k, d, scale,
    BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    o_q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    o_k, o_d = tl.arange(0, TILE_K), tl.arange(0, D)
    tl.static_assert(TILE_K <= 32)
    x_k = i_bh * m_k * d
    b_whole = load_means(q + i_bh * m_q * d, o_q, o_d, m_q, d)
    # of a 16-bit mean what rounding took is a second factor
    b_q = b_whole.to(k.dtype.element_ty)
    b_rest = (b_whole - b_q.to(tl.float32)).to(k.dtype.element_ty)
    if q_far is not None:
        b_qf = load_means(q_far + i_bh * m_q * d, o_q, o_d, m_q, d)
    p_bits = bit_row(bits, i_bh * m_q + tl.minimum(o_q, m_q - 1), m_k)
    b_c = tl.zeros([TILE_Q, D], tl.float32)
    b_m = tl.full([TILE_Q], -float("inf"), tl.float32)
    b_l = tl.zeros([TILE_Q], tl.float32)
    b_r = tl.zeros([TILE_Q], tl.float32)
    for i in tl.range(0, tl.cdiv(n_valid, BLOCK_K), TILE_K, num_stages=STAGES):
        b_k = load_means(k + x_k, i + o_k, o_d, m_k, d)
        b_v = load_means(v + x_k, i + o_k, o_d, m_k, d)
        # a tile lies in one word
        b_bits = tl.load(p_bits + i // 32)
        m_exact = ((b_bits[:, None] >> (i + o_k)[None, :] % 32) & 1) != 0
        if q_far is not None:
            b_kf = load_means(k_far + x_k, i + o_k, o_d, m_k, d)
            # [TQ, D] @ [D, TK] -> [TQ, TK]
            b_e = tl.abs(tl.dot(b_qf, tl.trans(b_k), input_precision=PRECISION))
            b_e += tl.abs(tl.dot(b_q, tl.trans(b_kf), input_precision=PRECISION))
        b_g = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if k_rest is not None:
            b_kr = load_means(k_rest + x_k, i + o_k, o_d, m_k, d)
            b_g = tl.dot(b_q, tl.trans(b_kr), b_g)
            b_g = tl.dot(b_rest, tl.trans(b_k), b_g)
        if q_far is not None:
            m_exact = m_exact | (tl.abs(b_g) <= b_e)
        b_size = (n_valid - (i + o_k) * BLOCK_K).to(tl.float32)
        b_bias = tl.where(b_size > 0, tl.log2(tl.clamp(b_size, 1.0, BLOCK_K)), -float("inf"))
        b_s = b_g * scale + b_bias[None, :]
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_a = tl.exp2(b_m - b_new)
        b_l = b_l * b_a + tl.sum(b_p, 1)
        b_r = b_r * b_a + tl.sum(tl.where(m_exact, b_p, 0.0), 1)
        b_p = tl.where(m_exact, 0.0, b_p).to(b_v.dtype)
        # [TQ, TK] @ [TK, D] -> [TQ, D]
        b_c = tl.dot(b_p, b_v, b_c * b_a[:, None], input_precision=PRECISION)
        b_m = b_new
    b_l = tl.where(b_l > 0, b_l, 1.0)
    tl.store(ratio + i_bh * m_q + o_q, b_r / b_l, mask=o_q < m_q)
    p_c = shift + (i_bh * m_q + o_q[:, None]) * d + o_d[None, :]
    tl.store(p_c, b_c / b_l[:, None], mask=(o_q[:, None] < m_q) & (o_d[None, :] < d))


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
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """r [B, H, Mq] and C [B, H, Mq, D], float32; launch None is the table's row."""
    q_mean, q_far = (
        block_means(q, table.block_q, spread=gapr) if means is None else (means.q, means.q_far)
    )
    pool = pooled_blocks(
        k, v, table.block_k, kv_len, means and means.k, rest=k.element_size() == 2, spread=gapr
    )
    ratio, shift = q_mean.new_empty(q_mean.shape[:3]), torch.empty_like(q_mean)
    launch = launch or find("coefficients", capability_of(q), q.shape[-1], table.block_q)
    limits = key_limits(k, kv_len)
    limits.pop("PADDED")
    arguments = {
        "q": q_mean, "q_far": q_far if gapr else None, "k": pool.k, "k_rest": pool.k_rest,
        "k_far": (pool.k_far if means is None else means.k_far) if gapr else None, "v": pool.v,
        "bits": kept_bits(table, kv_len), "ratio": ratio, "shift": shift, **limits,
        "m_q": q_mean.shape[2], "m_k": pool.k.shape[2], "d": q.shape[-1],
        "scale": log2_scale(scale, q), "BLOCK_K": table.block_k, "TILE_Q": TILE_Q,
        "TILE_K": launch.tile, "D": padded(q.shape[-1]), "STAGES": launch.stages,
        "PRECISION": launch.precision,
    }  # fmt: skip
    grid = (block_count(q_mean.shape[2], TILE_Q), q.shape[1], q.shape[0])
    run(_rectified_attention_coefficients_fwd_kernel, grid, arguments, launch)
    return ratio, shift
