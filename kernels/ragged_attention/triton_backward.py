"""Gradients of attention over ragged tiles on CUDA, in Triton.

    P = exp(s − LSE),  δ = rowsum(dO∘O) − dLSE,  dS = P∘(dO·vᵀ − δ)
    dq = scale·dS·k,  dk = scale·dSᵀ·q,  dv = Pᵀ·dO

dq runs over the rows of the table, dk and dv over its transpose: no atomics, so the result does not
depend on the order of programs. Every load is masked: a training step has other costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.triton_backward import dot_add, load_lse
from dit_accel.kernels.block_table.transpose import transpose_table
from dit_accel.kernels.launch import Launch, capability_of, find, run, split_head_dim
from dit_accel.kernels.tiles import load_tile, log2_scale, scores, tile_pointers
from dit_accel.table import BlockTable


@triton.jit
def _store(p_x, b_x, o_x, n):
    if p_x is not None:
        tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=o_x[:, None] < n)


@triton.jit(do_not_specialize=["n_q", "width"])
def _ragged_attention_bwd_dq_kernel(
    q, k, v, do, lse, delta, dq, indices, counts, q_bounds, k_bounds,
    s_q, s_k, s_v, s_do, s_dq, n_q, width, scale2, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_row = i_bh * tl.num_programs(0) + i_m
    SPLIT: tl.constexpr = BLOCK_K // TILE
    p_idx = indices + i_row * width
    n_kept = tl.load(counts + i_row)
    i_b, i_h = i_b.to(tl.int64), i_h.to(tl.int64)
    i_q = tl.load(q_bounds + i_m).to(tl.int64)
    n_own = tl.load(q_bounds + i_m + 1) - i_q
    o_q = tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, TILE)
    x_q = q + i_b * s_q[0] + i_h * s_q[1] + i_q * s_q[2]
    x_do = do + i_b * s_do[0] + i_h * s_do[1] + i_q * s_do[2]
    x_dq = dq + i_b * s_dq[0] + i_h * s_dq[1] + i_q * s_dq[2]
    x_k = k + i_b * s_k[0] + i_h * s_k[1]
    x_v = v + i_b * s_v[0] + i_h * s_v[1]
    b_q = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D0, 0), 0, o_q, n_own, True)
    b_q1 = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D1, D0), 0, o_q, n_own, True)
    b_do = load_tile(tile_pointers(x_do, s_do[2], s_do[3], BLOCK_Q, D0, 0), 0, o_q, n_own, True)
    b_do1 = load_tile(tile_pointers(x_do, s_do[2], s_do[3], BLOCK_Q, D1, D0), 0, o_q, n_own, True)
    b_lse = load_lse(lse + i_bh * n_q + i_q, o_q, n_own)
    b_delta = tl.load(delta + i_bh * n_q + i_q + o_q, mask=o_q < n_own, other=0.0)
    p_k = tile_pointers(x_k, s_k[2], s_k[3], TILE, D0, 0)
    p_k1 = tile_pointers(x_k, s_k[2], s_k[3], TILE, D1, D0)
    p_v = tile_pointers(x_v, s_v[2], s_v[3], TILE, D0, 0)
    p_v1 = tile_pointers(x_v, s_v[2], s_v[3], TILE, D1, D0)
    b_dq = tl.zeros([BLOCK_Q, D0], tl.float32)
    b_dq1 = tl.zeros([BLOCK_Q, D1 if D1 > 0 else 1], tl.float32)
    for i in tl.range(0, n_kept * SPLIT, num_stages=STAGES):
        p_tile = k_bounds + tl.load(p_idx + i // SPLIT)
        i_k = tl.load(p_tile).to(tl.int64) + i % SPLIT * TILE
        n_left = tl.load(p_tile + 1) - i_k
        b_k = load_tile(p_k, i_k * s_k[2], o_k, n_left, True)
        b_k1 = load_tile(p_k1, i_k * s_k[2], o_k, n_left, True)
        b_v = load_tile(p_v, i_k * s_v[2], o_k, n_left, True)
        b_v1 = load_tile(p_v1, i_k * s_v[2], o_k, n_left, True)
        b_p = tl.exp2(scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale2 - b_lse[:, None])
        b_p = tl.where(o_k[None, :] < n_left, b_p, 0.0)
        b_ds = b_p * (scores(b_do, b_do1, b_v, b_v1, PRECISION) - b_delta[:, None])
        b_dq = dot_add(b_ds, b_k, b_dq, PRECISION)
        b_dq1 = dot_add(b_ds, b_k1, b_dq1, PRECISION)
    _store(tile_pointers(x_dq, s_dq[2], s_dq[3], BLOCK_Q, D0, 0), b_dq * scale, o_q, n_own)
    _store(tile_pointers(x_dq, s_dq[2], s_dq[3], BLOCK_Q, D1, D0), b_dq1 * scale, o_q, n_own)


@triton.jit(do_not_specialize=["n_q"])
def _ragged_attention_bwd_dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, starts, counts, rows, q_bounds, k_bounds,
    s_q, s_k, s_v, s_do, s_dk, s_dv, n_q, scale2, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_row = i_bh * tl.num_programs(0) + i_m
    SPLIT: tl.constexpr = BLOCK_Q // TILE
    p_idx = rows + tl.load(starts + i_row)
    n_rows = tl.load(counts + i_row)
    i_b, i_h = i_b.to(tl.int64), i_h.to(tl.int64)
    i_k = tl.load(k_bounds + i_m).to(tl.int64)
    n_own = tl.load(k_bounds + i_m + 1) - i_k
    o_k = tl.arange(0, BLOCK_K)
    o_q = tl.arange(0, TILE)
    x_q = q + i_b * s_q[0] + i_h * s_q[1]
    x_do = do + i_b * s_do[0] + i_h * s_do[1]
    x_k = k + i_b * s_k[0] + i_h * s_k[1] + i_k * s_k[2]
    x_v = v + i_b * s_v[0] + i_h * s_v[1] + i_k * s_v[2]
    x_dk = dk + i_b * s_dk[0] + i_h * s_dk[1] + i_k * s_dk[2]
    x_dv = dv + i_b * s_dv[0] + i_h * s_dv[1] + i_k * s_dv[2]
    b_k = load_tile(tile_pointers(x_k, s_k[2], s_k[3], BLOCK_K, D0, 0), 0, o_k, n_own, True)
    b_k1 = load_tile(tile_pointers(x_k, s_k[2], s_k[3], BLOCK_K, D1, D0), 0, o_k, n_own, True)
    b_v = load_tile(tile_pointers(x_v, s_v[2], s_v[3], BLOCK_K, D0, 0), 0, o_k, n_own, True)
    b_v1 = load_tile(tile_pointers(x_v, s_v[2], s_v[3], BLOCK_K, D1, D0), 0, o_k, n_own, True)
    p_q = tile_pointers(x_q, s_q[2], s_q[3], TILE, D0, 0)
    p_q1 = tile_pointers(x_q, s_q[2], s_q[3], TILE, D1, D0)
    p_do = tile_pointers(x_do, s_do[2], s_do[3], TILE, D0, 0)
    p_do1 = tile_pointers(x_do, s_do[2], s_do[3], TILE, D1, D0)
    b_dk = tl.zeros([BLOCK_K, D0], tl.float32)
    b_dv = tl.zeros([BLOCK_K, D0], tl.float32)
    b_dk1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else 1], tl.float32)
    b_dv1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else 1], tl.float32)
    for i in tl.range(0, n_rows * SPLIT, num_stages=STAGES):
        p_tile = q_bounds + tl.load(p_idx + i // SPLIT)
        i_q = tl.load(p_tile).to(tl.int64) + i % SPLIT * TILE
        n_left = tl.load(p_tile + 1) - i_q
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
    _store(tile_pointers(x_dk, s_dk[2], s_dk[3], BLOCK_K, D0, 0), b_dk * scale, o_k, n_own)
    _store(tile_pointers(x_dk, s_dk[2], s_dk[3], BLOCK_K, D1, D0), b_dk1 * scale, o_k, n_own)
    _store(tile_pointers(x_dv, s_dv[2], s_dv[3], BLOCK_K, D0, 0), b_dv, o_k, n_own)
    _store(tile_pointers(x_dv, s_dv[2], s_dv[3], BLOCK_K, D1, D0), b_dv1, o_k, n_own)


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
    """dq, dk, dv in the layouts of q, k and v; P is recomputed from LSE, sums are in float32."""
    delta = (grad_out.float() * out.float()).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    tensors = {"q": q, "k": k, "v": v, "do": grad_out, "lse": lse.contiguous(), "delta": delta}
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    common = (tensors, table, (q_bounds, k_bounds), scale)
    capability, d = capability_of(q), q.shape[-1]
    launch = find("ragged_dq", capability, d, table.block_q)
    run(_ragged_attention_bwd_dq_kernel, *dq_launch(*common, launch, dq))
    launch = find("ragged_dkdv", capability, d, table.block_k)
    found = transpose_table(table)
    run(_ragged_attention_bwd_dkdv_kernel, *dkdv_launch(*common, launch, found, dk, dv))
    return dq, dk, dv


def dq_launch(
    tensors: dict[str, Tensor],
    table: BlockTable,
    bounds: tuple[Tensor, Tensor],
    scale: float | None,
    launch: Launch,
    dq: Tensor,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the dq kernel."""
    arguments = {
        **_common(tensors, table, bounds, scale, launch, min(launch.tile, table.block_k)),
        "dq": dq, "indices": table.indices.contiguous(), "counts": table.counts.contiguous(),
        "s_dq": dq.stride(), "width": table.indices.shape[-1],
    }  # fmt: skip
    return (table.query_blocks, dq.shape[1], dq.shape[0]), arguments, launch


def dkdv_launch(
    tensors: dict[str, Tensor],
    table: BlockTable,
    bounds: tuple[Tensor, Tensor],
    scale: float | None,
    launch: Launch,
    transposed: tuple[Tensor, Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the dk, dv kernel."""
    starts, counts, rows = transposed
    arguments = {
        **_common(tensors, table, bounds, scale, launch, min(launch.tile, table.block_q)),
        "dk": dk, "dv": dv, "starts": starts, "counts": counts, "rows": rows,
        "s_dk": dk.stride(), "s_dv": dv.stride(),
    }  # fmt: skip
    return (table.key_blocks, dk.shape[1], dk.shape[0]), arguments, launch


def _common(
    tensors: dict[str, Tensor],
    table: BlockTable,
    bounds: tuple[Tensor, Tensor],
    scale: float | None,
    launch: Launch,
    tile: int,
) -> dict[str, object]:
    q = tensors["q"]
    d0, d1 = split_head_dim(q.shape[-1])
    plain = q.shape[-1] ** -0.5 if scale is None else scale
    return {
        **tensors, **{f"s_{name}": tensors[name].stride() for name in ("q", "k", "v", "do")},
        "q_bounds": bounds[0], "k_bounds": bounds[1], "n_q": q.shape[2],
        "scale2": log2_scale(scale, q), "scale": plain, "BLOCK_Q": table.block_q,
        "BLOCK_K": table.block_k, "TILE": tile, "D0": d0, "D1": d1, "STAGES": launch.stages,
        "PRECISION": launch.precision,
    }  # fmt: skip
