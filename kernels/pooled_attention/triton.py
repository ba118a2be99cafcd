"""Pooled attention on CUDA, in Triton: the sparse kernel, then one key per skipped block.

    logits: s_ij for kept j;  scale·q_i·k̄_m + log|m| with value v̄_m for every skipped block m

Kept and skipped blocks share one online softmax in one kernel. The means are in the dtype of k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.triton import attend, supports
from dit_accel.kernels.block_sparse_attention.triton_backward import (
    _block_sparse_attention_bwd_dkdv_kernel,
    _block_sparse_attention_bwd_dq_kernel,
    dkdv_launch,
    dot_add,
    dq_launch,
    load_lse,
    specialized,
)
from dit_accel.kernels.block_table.pool import kept_bits, pooled_blocks
from dit_accel.kernels.block_table.transpose import transpose_table
from dit_accel.kernels.launch import Launch, capability_of, find, run, split_head_dim
from dit_accel.kernels.tiles import (
    bit_row,
    key_limits,
    load_tile,
    log2_scale,
    pool_bias,
    scores,
    tile_pointers,
)
from dit_accel.table import BlockTable, block_count

__all__ = ["backward", "pooled_attention", "supports"]


# Programs that fill the GPU: the queries of a head are split so that about this many run.
_PROGRAMS = 256


@triton.jit(do_not_specialize=["n_q", "n_k", "n_pool", "m_q", "m_part"])
def _pooled_attention_bwd_dkdv_kernel(
    q, do, pool_k, pool_v, bits, lse, delta, kv_len, dk, dv,
    s_q, s_do, n_q, n_k, n_pool, m_q, m_part, n_heads, scale2,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_t, i_bh, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_b, i_h = i_bh // n_heads, i_bh % n_heads
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    D: tl.constexpr = D0 + D1
    o_k, o_q = tl.arange(0, TILE), tl.arange(0, BLOCK_Q)
    x_k, x_v = pool_k + (i_bh * n_pool + i_t * TILE) * D, pool_v + (i_bh * n_pool + i_t * TILE) * D
    b_k = load_tile(tile_pointers(x_k, D, 1, TILE, D0, 0), 0, o_k, TILE, False)
    b_k1 = load_tile(tile_pointers(x_k, D, 1, TILE, D1, D0), 0, o_k, TILE, False)
    b_v = load_tile(tile_pointers(x_v, D, 1, TILE, D0, 0), 0, o_k, TILE, False)
    b_v1 = load_tile(tile_pointers(x_v, D, 1, TILE, D1, D0), 0, o_k, TILE, False)
    x_q, x_do = q + i_b * s_q[0] + i_h * s_q[1], do + i_b * s_do[0] + i_h * s_do[1]
    p_q = tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D0, 0)
    p_q1 = tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D1, D0)
    p_do = tile_pointers(x_do, s_do[2], s_do[3], BLOCK_Q, D0, 0)
    p_do1 = tile_pointers(x_do, s_do[2], s_do[3], BLOCK_Q, D1, D0)
    b_dk = tl.zeros([TILE, D0], tl.float32)
    b_dv = tl.zeros([TILE, D0], tl.float32)
    b_dk1 = tl.zeros([TILE, D1 if D1 > 0 else 1], tl.float32)
    b_dv1 = tl.zeros([TILE, D1 if D1 > 0 else 1], tl.float32)
    for i in range(0, tl.minimum(m_part, m_q - i_s * m_part)):
        i_n = i_s.to(tl.int64) * m_part + i
        i_q = i_n * BLOCK_Q
        n_left = n_q - i_q
        b_q = load_tile(p_q, i_q * s_q[2], o_q, n_left, True)
        b_q1 = load_tile(p_q1, i_q * s_q[2], o_q, n_left, True)
        b_do = load_tile(p_do, i_q * s_do[2], o_q, n_left, True)
        b_do1 = load_tile(p_do1, i_q * s_do[2], o_q, n_left, True)
        b_lse = load_lse(lse + i_bh * n_q + i_q, o_q, n_left)
        b_delta = tl.load(delta + i_bh * n_q + i_q + o_q, mask=o_q < n_left, other=0.0)
        p_bits = bit_row(bits, i_bh * m_q + i_n, n_pool)
        b_bias = pool_bias(p_bits, i_t * TILE + o_k, n_valid, BLOCK_K)
        b_s = scores(b_k, b_k1, b_q, b_q1, PRECISION) * scale2 + b_bias[:, None]
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv = dot_add(b_p, b_do, b_dv, PRECISION)
        b_dv1 = dot_add(b_p, b_do1, b_dv1, PRECISION)
        b_ds = b_p * (scores(b_v, b_v1, b_do, b_do1, PRECISION) - b_delta[None, :])
        b_dk = dot_add(b_ds, b_q, b_dk, PRECISION)
        b_dk1 = dot_add(b_ds, b_q1, b_dk1, PRECISION)
    x_o = ((i_s * tl.num_programs(1) + i_bh) * n_pool + i_t * TILE) * D
    tl.store(tile_pointers(dk + x_o, D, 1, TILE, D0, 0), b_dk)
    tl.store(tile_pointers(dv + x_o, D, 1, TILE, D0, 0), b_dv)
    if D1 > 0:
        tl.store(tile_pointers(dk + x_o, D, 1, TILE, D1, D0), b_dk1)
        tl.store(tile_pointers(dv + x_o, D, 1, TILE, D1, D0), b_dv1)


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    return_lse: bool = False,
    k_mean: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.pooled_attention; the output has the layout of q. k_mean: [B, H, Mk, D] float32, the
    block means of k if known."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    launch = find("forward", capability_of(q), q.shape[-1], table.block_q)
    pool = pooled_keys(k, v, table, kv_len, min(launch.tile, table.block_k), k_mean)
    attend(q, k, v, out, lse, table, launch, scale, kv_len, pool=pool)
    return out if lse is None else (out, lse)


def pooled_keys(
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    kv_len: int | Tensor | None,
    tile: int,
    k_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """k̄, v̄ [B, H, Mp, D] in the dtype of k, Mp being Mk in whole tiles, and the table as bits."""
    pool = pooled_blocks(k, v, table.block_k, kv_len, known=k_mean, multiple=tile)
    return pool.k, pool.v, kept_bits(table, kv_len)


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
    """dq, dk, dv: kept and pooled keys share LSE and δ; a mean's gradient spreads evenly."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    tensors = {"q": q, "k": k, "v": v, "do": grad_out, "lse": lse.contiguous(), "delta": delta}
    rows = [
        find(op, capability_of(q), q.shape[-1], block, specialized=False)
        for op, block in (("dq", table.block_q), ("dkdv", table.block_k), ("pool", table.block_q))
    ]
    common = (tensors, table, scale, kv_len)
    pool = pooled_keys(k, v, table, kv_len, max(min(row.tile, table.block_k) for row in rows))
    dq_call = dq_launch(*common, rows[0], out, grad_lse, dq, pool)
    run(_block_sparse_attention_bwd_dq_kernel, *dq_call)
    grads = _pool_gradients(*common, rows[2], pool)
    turned = transpose_table(table)
    hopper = specialized(q, k, v, grad_out, table, kv_len)
    if hopper is not None:
        x = hopper.prepare(grad_out, grad_lse, q, k, v, out, lse, table, scale, kv_len)
        hopper.keys_and_values(x, turned, dk, dv, grads)
    else:
        dkdv_call = dkdv_launch(*common, rows[1], turned, dk, dv, grads)
        run(_block_sparse_attention_bwd_dkdv_kernel, *dkdv_call)
    return dq, dk, dv


def _pool_gradients(
    tensors: dict[str, Tensor],
    table: BlockTable,
    scale: float | None,
    kv_len: int | Tensor | None,
    launch: Launch,
    pool: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of k̄ (before the scale) and v̄, float32 [B, H, Mp, D], from parts of the queries."""
    q, (k_mean, v_mean, bits) = tensors["q"], pool
    (batch, heads, n_pool, d), tile = k_mean.shape, min(launch.tile, table.block_k)
    programs = batch * heads * (n_pool // tile)
    part = block_count(table.query_blocks, block_count(_PROGRAMS, programs))
    parts = block_count(table.query_blocks, part)
    dk, dv = (k_mean.new_empty((parts, *k_mean.shape), dtype=torch.float32) for _ in range(2))
    d0, d1 = split_head_dim(d)
    limits = key_limits(tensors["k"], kv_len)
    limits.pop("PADDED")
    arguments = {
        **{name: tensors[name] for name in ("q", "do", "lse", "delta")}, **limits, "pool_k": k_mean,
        "pool_v": v_mean, "bits": bits, "dk": dk, "dv": dv, "s_q": q.stride(), "n_q": q.shape[2],
        "s_do": tensors["do"].stride(), "n_pool": n_pool, "m_q": table.query_blocks, "m_part": part,
        "n_heads": heads, "scale2": log2_scale(scale, q), "BLOCK_Q": table.block_q, "TILE": tile,
        "BLOCK_K": table.block_k, "D0": d0, "D1": d1, "PRECISION": launch.precision,
    }  # fmt: skip
    grid = (n_pool // tile, batch * heads, parts)
    run(_pooled_attention_bwd_dkdv_kernel, grid, arguments, launch)
    return dk.sum(0), dv.sum(0)
