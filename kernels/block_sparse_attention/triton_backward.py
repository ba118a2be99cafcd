"""Gradients of block-sparse attention on CUDA, in Triton.

    P = exp(s − LSE),  δ = rowsum(dO∘O) − dLSE,  dS = P∘(dO·vᵀ − δ)
    dq = scale·dS·k,  dk = scale·dSᵀ·q,  dv = Pᵀ·dO

dq runs over the rows of the table, dk and dv over its transpose, so both loops visit kept blocks
only. No atomics: the result does not depend on the order of programs. Hopper has kernels of its own
(gluon_backward.py).
"""

from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    whole_blocks,
)
from dit_accel.table import BlockTable


@triton.jit
def load_lse(p_lse, o_q, n_q):
    """LSE in log2 units; +inf for rows without a key, so that their probabilities are zero."""
    b_lse = tl.load(p_lse + o_q, mask=o_q < n_q, other=float("inf"))
    return tl.where(b_lse == -float("inf"), float("inf"), b_lse) * 1.4426950408889634


@triton.jit
def dot_add(b_x, b_y, b_acc, PRECISION: tl.constexpr):
    """acc + x·y, where y is a tile or None."""
    if b_y is not None:
        b_acc = tl.dot(b_x.to(b_y.dtype), b_y, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def _row_dot(b_x, b_y):
    b_sum = tl.sum(b_x.to(tl.float32) * b_y.to(tl.float32), 1)
    return b_sum


@triton.jit
def _store(p_x, b_x, o_x, n):
    if p_x is not None:
        tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=o_x[:, None] < n)


@triton.jit(do_not_specialize=["n_q", "n_k", "n_pool", "width"])
def _block_sparse_attention_bwd_dq_kernel(
    q, k, v, o, do, lse, dlse, delta, dq, indices, counts, kv_len,
    pool_k, pool_v, bits, n_pool,
    s_q, s_k, s_v, s_o, s_do, s_dq, n_q, n_k, width, scale2, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr,
    PADDED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_row = i_bh * tl.num_programs(0) + i_m
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    SPLIT: tl.constexpr = BLOCK_K // TILE
    p_idx = indices + i_row * width
    n_kept = tl.load(counts + i_row)
    n_whole = whole_blocks(p_idx, n_kept, n_valid, BLOCK_K, PADDED)

    i_q = i_m.to(tl.int64) * BLOCK_Q
    i_b, i_h = i_b.to(tl.int64), i_h.to(tl.int64)
    o_q = i_m * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, TILE)
    x_q = q + i_b * s_q[0] + i_h * s_q[1] + i_q * s_q[2]
    x_o = o + i_b * s_o[0] + i_h * s_o[1] + i_q * s_o[2]
    x_do = do + i_b * s_do[0] + i_h * s_do[1] + i_q * s_do[2]
    x_dq = dq + i_b * s_dq[0] + i_h * s_dq[1] + i_q * s_dq[2]
    x_k = k + i_b * s_k[0] + i_h * s_k[1]
    x_v = v + i_b * s_v[0] + i_h * s_v[1]
    b_q = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D0, 0), 0, o_q, n_q, True)
    b_q1 = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D1, D0), 0, o_q, n_q, True)
    b_do = load_tile(tile_pointers(x_do, s_do[2], s_do[3], BLOCK_Q, D0, 0), 0, o_q, n_q, True)
    b_do1 = load_tile(tile_pointers(x_do, s_do[2], s_do[3], BLOCK_Q, D1, D0), 0, o_q, n_q, True)
    b_o = load_tile(tile_pointers(x_o, s_o[2], s_o[3], BLOCK_Q, D0, 0), 0, o_q, n_q, True)
    b_o1 = load_tile(tile_pointers(x_o, s_o[2], s_o[3], BLOCK_Q, D1, D0), 0, o_q, n_q, True)
    b_delta = _row_dot(b_do, b_o)
    if D1 > 0:
        b_delta += _row_dot(b_do1, b_o1)
    if dlse is not None:
        b_delta -= tl.load(dlse + i_bh * n_q + o_q, mask=o_q < n_q, other=0.0)
    tl.store(delta + i_bh * n_q + o_q, b_delta, mask=o_q < n_q)
    b_lse = load_lse(lse + i_bh * n_q, o_q, n_q)
    p_k = tile_pointers(x_k, s_k[2], s_k[3], TILE, D0, 0)
    p_k1 = tile_pointers(x_k, s_k[2], s_k[3], TILE, D1, D0)
    p_v = tile_pointers(x_v, s_v[2], s_v[3], TILE, D0, 0)
    p_v1 = tile_pointers(x_v, s_v[2], s_v[3], TILE, D1, D0)
    b_dq = tl.zeros([BLOCK_Q, D0], tl.float32)
    b_dq1 = tl.zeros([BLOCK_Q, D1 if D1 > 0 else 1], tl.float32)

    for i in tl.range(0, n_whole * SPLIT, num_stages=STAGES):
        i_k = tl.load(p_idx + i // SPLIT).to(tl.int64) * BLOCK_K + i % SPLIT * TILE
        b_k = load_tile(p_k, i_k * s_k[2], o_k, n_k, False)
        b_k1 = load_tile(p_k1, i_k * s_k[2], o_k, n_k, False)
        b_v = load_tile(p_v, i_k * s_v[2], o_k, n_k, False)
        b_v1 = load_tile(p_v1, i_k * s_v[2], o_k, n_k, False)
        b_p = tl.exp2(scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale2 - b_lse[:, None])
        b_ds = b_p * (scores(b_do, b_do1, b_v, b_v1, PRECISION) - b_delta[:, None])
        b_dq = dot_add(b_ds, b_k, b_dq, PRECISION)
        b_dq1 = dot_add(b_ds, b_k1, b_dq1, PRECISION)

    for i in tl.range(n_whole * SPLIT, n_kept * SPLIT, num_stages=1):
        i_k = tl.load(p_idx + i // SPLIT).to(tl.int64) * BLOCK_K + i % SPLIT * TILE
        n_left = n_valid - i_k
        b_k = load_tile(p_k, i_k * s_k[2], o_k, n_left, True)
        b_k1 = load_tile(p_k1, i_k * s_k[2], o_k, n_left, True)
        b_v = load_tile(p_v, i_k * s_v[2], o_k, n_left, True)
        b_v1 = load_tile(p_v1, i_k * s_v[2], o_k, n_left, True)
        b_p = tl.exp2(scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale2 - b_lse[:, None])
        b_p = tl.where(o_k[None, :] < n_left, b_p, 0.0)
        b_ds = b_p * (scores(b_do, b_do1, b_v, b_v1, PRECISION) - b_delta[:, None])
        b_dq = dot_add(b_ds, b_k, b_dq, PRECISION)
        b_dq1 = dot_add(b_ds, b_k1, b_dq1, PRECISION)

    if pool_k is not None:
        x_pk, x_pv = pool_k + i_bh * n_pool * (D0 + D1), pool_v + i_bh * n_pool * (D0 + D1)
        p_bits = bit_row(bits, i_row, n_pool)
        p_k = tile_pointers(x_pk, D0 + D1, 1, TILE, D0, 0)
        p_k1 = tile_pointers(x_pk, D0 + D1, 1, TILE, D1, D0)
        p_v = tile_pointers(x_pv, D0 + D1, 1, TILE, D0, 0)
        p_v1 = tile_pointers(x_pv, D0 + D1, 1, TILE, D1, D0)
        for i in tl.range(0, tl.cdiv(n_valid, TILE * BLOCK_K), num_stages=STAGES):
            b_bias = pool_bias(p_bits, i * TILE + o_k, n_valid, BLOCK_K)
            b_k = load_tile(p_k, i * TILE * (D0 + D1), o_k, n_k, False)
            b_k1 = load_tile(p_k1, i * TILE * (D0 + D1), o_k, n_k, False)
            b_v = load_tile(p_v, i * TILE * (D0 + D1), o_k, n_k, False)
            b_v1 = load_tile(p_v1, i * TILE * (D0 + D1), o_k, n_k, False)
            b_s = scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale2 + b_bias[None, :]
            b_p = tl.exp2(b_s - b_lse[:, None])
            b_ds = b_p * (scores(b_do, b_do1, b_v, b_v1, PRECISION) - b_delta[:, None])
            b_dq = dot_add(b_ds, b_k, b_dq, PRECISION)
            b_dq1 = dot_add(b_ds, b_k1, b_dq1, PRECISION)

    _store(tile_pointers(x_dq, s_dq[2], s_dq[3], BLOCK_Q, D0, 0), b_dq * scale, o_q, n_q)
    _store(tile_pointers(x_dq, s_dq[2], s_dq[3], BLOCK_Q, D1, D0), b_dq1 * scale, o_q, n_q)


@triton.jit(do_not_specialize=["n_q", "n_k", "n_max", "n_pool"])
def _block_sparse_attention_bwd_dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, starts, counts, rows, kv_len,
    pool_dk, pool_dv, n_pool,
    s_q, s_k, s_v, s_do, s_dk, s_dv, n_q, n_k, n_max, scale2, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_row = i_bh * tl.num_programs(0) + i_m
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    SPLIT: tl.constexpr = BLOCK_Q // TILE
    p_idx = rows + tl.load(starts + i_row)
    n_rows = tl.load(counts + i_row)
    n_whole = whole_blocks(p_idx, n_rows, n_q, BLOCK_Q, False)

    i_k = i_m.to(tl.int64) * BLOCK_K
    i_b, i_h = i_b.to(tl.int64), i_h.to(tl.int64)
    o_k = i_m * BLOCK_K + tl.arange(0, BLOCK_K)
    o_q = tl.arange(0, TILE)
    x_q = q + i_b * s_q[0] + i_h * s_q[1]
    x_do = do + i_b * s_do[0] + i_h * s_do[1]
    x_k = k + i_b * s_k[0] + i_h * s_k[1] + i_k * s_k[2]
    x_v = v + i_b * s_v[0] + i_h * s_v[1] + i_k * s_v[2]
    x_dk = dk + i_b * s_dk[0] + i_h * s_dk[1] + i_k * s_dk[2]
    x_dv = dv + i_b * s_dv[0] + i_h * s_dv[1] + i_k * s_dv[2]
    b_k = load_tile(tile_pointers(x_k, s_k[2], s_k[3], BLOCK_K, D0, 0), 0, o_k, n_valid, True)
    b_k1 = load_tile(tile_pointers(x_k, s_k[2], s_k[3], BLOCK_K, D1, D0), 0, o_k, n_valid, True)
    b_v = load_tile(tile_pointers(x_v, s_v[2], s_v[3], BLOCK_K, D0, 0), 0, o_k, n_valid, True)
    b_v1 = load_tile(tile_pointers(x_v, s_v[2], s_v[3], BLOCK_K, D1, D0), 0, o_k, n_valid, True)
    p_q = tile_pointers(x_q, s_q[2], s_q[3], TILE, D0, 0)
    p_q1 = tile_pointers(x_q, s_q[2], s_q[3], TILE, D1, D0)
    p_do = tile_pointers(x_do, s_do[2], s_do[3], TILE, D0, 0)
    p_do1 = tile_pointers(x_do, s_do[2], s_do[3], TILE, D1, D0)
    b_dk = tl.zeros([BLOCK_K, D0], tl.float32)
    b_dv = tl.zeros([BLOCK_K, D0], tl.float32)
    b_dk1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else 1], tl.float32)
    b_dv1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else 1], tl.float32)

    for i in tl.range(0, n_whole * SPLIT, num_stages=STAGES):
        i_q = tl.load(p_idx + i // SPLIT).to(tl.int64) * BLOCK_Q + i % SPLIT * TILE
        b_q = load_tile(p_q, i_q * s_q[2], o_q, n_q, False)
        b_q1 = load_tile(p_q1, i_q * s_q[2], o_q, n_q, False)
        b_do = load_tile(p_do, i_q * s_do[2], o_q, n_q, False)
        b_do1 = load_tile(p_do1, i_q * s_do[2], o_q, n_q, False)
        b_lse = load_lse(lse + i_bh * n_q + i_q, o_q, TILE)
        b_delta = tl.load(delta + i_bh * n_q + i_q + o_q)
        b_p = tl.exp2(scores(b_k, b_k1, b_q, b_q1, PRECISION) * scale2 - b_lse[None, :])
        b_dv = dot_add(b_p, b_do, b_dv, PRECISION)
        b_dv1 = dot_add(b_p, b_do1, b_dv1, PRECISION)
        b_ds = b_p * (scores(b_v, b_v1, b_do, b_do1, PRECISION) - b_delta[None, :])
        b_dk = dot_add(b_ds, b_q, b_dk, PRECISION)
        b_dk1 = dot_add(b_ds, b_q1, b_dk1, PRECISION)

    for i in tl.range(n_whole * SPLIT, n_rows * SPLIT, num_stages=1):
        i_q = tl.load(p_idx + i // SPLIT).to(tl.int64) * BLOCK_Q + i % SPLIT * TILE
        n_left = n_q - i_q
        b_q = load_tile(p_q, i_q * s_q[2], o_q, n_left, True)
        b_q1 = load_tile(p_q1, i_q * s_q[2], o_q, n_left, True)
        b_do = load_tile(p_do, i_q * s_do[2], o_q, n_left, True)
        b_do1 = load_tile(p_do1, i_q * s_do[2], o_q, n_left, True)
        b_lse = load_lse(lse + i_bh * n_q + i_q, o_q, n_left)
        b_delta = tl.load(delta + i_bh * n_q + i_q + o_q, mask=o_q < n_left, other=0.0)
        b_p = tl.exp2(scores(b_k, b_k1, b_q, b_q1, PRECISION) * scale2 - b_lse[None, :])
        b_dv = dot_add(b_p, b_do, b_dv, PRECISION)
        b_dv1 = dot_add(b_p, b_do1, b_dv1, PRECISION)
        b_ds = b_p * (scores(b_v, b_v1, b_do, b_do1, PRECISION) - b_delta[None, :])
        b_dk = dot_add(b_ds, b_q, b_dk, PRECISION)
        b_dk1 = dot_add(b_ds, b_q1, b_dk1, PRECISION)

    if pool_dk is not None:
        # a mean hands each of its tokens an equal share of its gradient
        size = tl.clamp((n_valid - i_m * BLOCK_K).to(tl.float32), 1.0, BLOCK_K)
        o_p = (i_bh * n_pool + i_m) * (D0 + D1) + tl.arange(0, D0)
        b_dk += (tl.load(pool_dk + o_p) / size)[None, :]
        b_dv += (tl.load(pool_dv + o_p) / size)[None, :]
        if D1 > 0:
            o_p1 = (i_bh * n_pool + i_m) * (D0 + D1) + D0 + tl.arange(0, D1)
            b_dk1 += (tl.load(pool_dk + o_p1) / size)[None, :]
            b_dv1 += (tl.load(pool_dv + o_p1) / size)[None, :]

    # a key beyond kv_len was read as zero, and its weights mean nothing
    m_k = (o_k < n_valid)[:, None]
    _store(
        tile_pointers(x_dk, s_dk[2], s_dk[3], BLOCK_K, D0, 0),
        tl.where(m_k, b_dk * scale, 0.0),
        o_k,
        n_max,
    )
    _store(
        tile_pointers(x_dk, s_dk[2], s_dk[3], BLOCK_K, D1, D0),
        tl.where(m_k, b_dk1 * scale, 0.0),
        o_k,
        n_max,
    )
    _store(
        tile_pointers(x_dv, s_dv[2], s_dv[3], BLOCK_K, D0, 0), tl.where(m_k, b_dv, 0.0), o_k, n_max
    )
    _store(
        tile_pointers(x_dv, s_dv[2], s_dv[3], BLOCK_K, D1, D0),
        tl.where(m_k, b_dv1, 0.0),
        o_k,
        n_max,
    )


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
    """dq, dk, dv in the layouts of q, k and v; P is recomputed from LSE, sums are in float32."""
    hopper = specialized(q, k, v, grad_out, table, kv_len)
    if hopper is not None:
        return hopper.backward(grad_out, grad_lse, q, k, v, out, lse, table, scale, kv_len)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    tensors = {"q": q, "k": k, "v": v, "do": grad_out, "lse": lse.contiguous(), "delta": delta}
    launches = [
        find(op, capability_of(q), q.shape[-1], block, specialized=False)
        for op, block in (("dq", table.block_q), ("dkdv", table.block_k))
    ]
    common = (tensors, table, scale, kv_len)
    transposed = transpose_table(table)
    run(_block_sparse_attention_bwd_dq_kernel, *dq_launch(*common, launches[0], out, grad_lse, dq))
    run(
        _block_sparse_attention_bwd_dkdv_kernel,
        *dkdv_launch(*common, launches[1], transposed, dk, dv),
    )
    return dq, dk, dv


def specialized(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, table: BlockTable, kv_len: int | Tensor | None
) -> ModuleType | None:
    """Hopper's kernels, where the launch table names them and they serve the call."""
    if not q.is_cuda:
        return None
    for op, block in (("dq", table.block_q), ("dkdv", table.block_k)):
        if not find(op, capability_of(q), q.shape[-1], block).specialized:
            return None
    from dit_accel.kernels.block_sparse_attention import gluon_backward

    if gluon_backward.unserved(q, k, v, grad, table, kv_len) is not None:
        return None
    return gluon_backward


def dq_launch(
    tensors: dict[str, Tensor],
    table: BlockTable,
    scale: float | None,
    kv_len: int | Tensor | None,
    launch: Launch,
    out: Tensor,
    grad_lse: Tensor | None,
    dq: Tensor,
    pool: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the dq kernel, which also writes δ; pool as in the forward."""
    pool_k, pool_v, bits = pool or (None, None, None)
    arguments = {
        **_common(tensors, table, scale, kv_len, launch, min(launch.tile, table.block_k)),
        "o": out, "dlse": None if grad_lse is None else grad_lse.contiguous(), "dq": dq,
        "indices": table.indices.contiguous(), "counts": table.counts.contiguous(),
        "s_o": out.stride(), "s_dq": dq.stride(), "pool_k": pool_k, "pool_v": pool_v,
        "bits": bits, "n_pool": 0 if pool_k is None else pool_k.shape[2],
        "width": table.indices.shape[-1],
    }  # fmt: skip
    return (table.query_blocks, *_heads(dq)), arguments, launch


def dkdv_launch(
    tensors: dict[str, Tensor],
    table: BlockTable,
    scale: float | None,
    kv_len: int | Tensor | None,
    launch: Launch,
    transposed: tuple[Tensor, Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
    pool_grads: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the dk and dv kernel.

    pool_grads: gradients of the pooled keys (before the scale) and values, float32 [B, H, Mp, D].
    """
    pool_dk, pool_dv = pool_grads or (None, None)
    starts, counts, rows = transposed
    arguments = {
        **_common(tensors, table, scale, kv_len, launch, min(launch.tile, table.block_q)),
        "dk": dk, "dv": dv, "starts": starts, "counts": counts, "rows": rows,
        "s_dk": dk.stride(), "s_dv": dv.stride(), "n_max": dk.shape[2],
        "pool_dk": pool_dk, "pool_dv": pool_dv,
        "n_pool": 0 if pool_dk is None else pool_dk.shape[2],
    }  # fmt: skip
    arguments.pop("PADDED")
    return (table.key_blocks, *_heads(dk)), arguments, launch


def _common(
    tensors: dict[str, Tensor],
    table: BlockTable,
    scale: float | None,
    kv_len: int | Tensor | None,
    launch: Launch,
    tile: int,
) -> dict[str, object]:
    q = tensors["q"]
    d0, d1 = split_head_dim(q.shape[-1])
    return {
        **tensors, **{f"s_{name}": tensors[name].stride() for name in ("q", "k", "v", "do")},
        **key_limits(tensors["k"], kv_len), "n_q": q.shape[2], "scale2": log2_scale(scale, q),
        "scale": q.shape[-1] ** -0.5 if scale is None else scale, "TILE": tile, "D0": d0, "D1": d1,
        "BLOCK_Q": table.block_q, "BLOCK_K": table.block_k,
        "STAGES": launch.stages, "PRECISION": launch.precision,
    }  # fmt: skip


def _heads(x: Tensor) -> tuple[int, int]:
    return x.shape[1], x.shape[0]
