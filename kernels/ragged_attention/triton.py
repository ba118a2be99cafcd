"""Attention over ragged tiles on CUDA, in Triton: one program per query tile.

Tile m of the keys is tokens bounds[m] … bounds[m + 1] of an unpadded sequence, so nothing is copied
to pad it. A row names its whole tiles first, and these are loaded without a mask. The epilogue adds
gate ⊙ coarse while the accumulator is in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import (
    Launch,
    capability_of,
    find,
    padded,
    run,
    split_head_dim,
    unsupported,
)
from dit_accel.kernels.ragged_attention.triton_backward import backward
from dit_accel.kernels.tiles import absorb, load_tile, log2_scale, scores, tile_pointers
from dit_accel.table import BlockTable

__all__ = ["backward", "ragged_attention", "supports", "tile_means"]


@triton.jit
def _finish(p_o, b_o, p_g, p_c, o_q, n_own):
    """Rows of O, plus gate ⊙ coarse where there is a gate."""
    if p_o is not None:
        if p_g is not None:
            b_g = tl.load(p_g, mask=o_q[:, None] < n_own, other=0.0).to(tl.float32)
            b_o += b_g * tl.load(p_c).to(tl.float32)[None, :]
        tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=o_q[:, None] < n_own)


@triton.jit(do_not_specialize=["n_q", "width"])
def _ragged_attention_fwd_kernel(
    q, k, v, o, lse, indices, counts, whole, q_bounds, k_bounds, gate, coarse,
    s_q, s_k, s_v, s_o, s_g, s_c, n_q, width, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_row = i_bh * tl.num_programs(0) + i_m
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    p_idx = indices + i_row * width
    n_kept = tl.load(counts + i_row)
    n_whole = tl.load(whole + i_row)

    i_b, i_h = i_b.to(tl.int64), i_h.to(tl.int64)
    i_q = tl.load(q_bounds + i_m).to(tl.int64)
    n_own = tl.load(q_bounds + i_m + 1) - i_q
    o_q = tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, TILE_K)
    x_q = q + i_b * s_q[0] + i_h * s_q[1] + i_q * s_q[2]
    x_k = k + i_b * s_k[0] + i_h * s_k[1]
    x_v = v + i_b * s_v[0] + i_h * s_v[1]
    b_q = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D0, 0), 0, o_q, n_own, True)
    b_q1 = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D1, D0), 0, o_q, n_own, True)
    p_k = tile_pointers(x_k, s_k[2], s_k[3], TILE_K, D0, 0)
    p_k1 = tile_pointers(x_k, s_k[2], s_k[3], TILE_K, D1, D0)
    p_v = tile_pointers(x_v, s_v[2], s_v[3], TILE_K, D0, 0)
    p_v1 = tile_pointers(x_v, s_v[2], s_v[3], TILE_K, D1, D0)
    b_o = tl.zeros([BLOCK_Q, D0], tl.float32)
    b_o1 = tl.zeros([BLOCK_Q, D1 if D1 > 0 else 1], tl.float32)
    b_m = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_Q], tl.float32)

    for i in tl.range(0, n_whole * SPLIT, num_stages=STAGES):
        i_k = tl.load(k_bounds + tl.load(p_idx + i // SPLIT)).to(tl.int64) + i % SPLIT * TILE_K
        b_k = load_tile(p_k, i_k * s_k[2], o_k, TILE_K, False)
        b_k1 = load_tile(p_k1, i_k * s_k[2], o_k, TILE_K, False)
        b_v = load_tile(p_v, i_k * s_v[2], o_k, TILE_K, False)
        b_v1 = load_tile(p_v1, i_k * s_v[2], o_k, TILE_K, False)
        b_s = scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale
        b_o, b_o1, b_m, b_l = absorb(b_s, b_v, b_v1, b_o, b_o1, b_m, b_l, PRECISION)

    for i in tl.range(n_whole * SPLIT, n_kept * SPLIT, num_stages=STAGES):
        p_tile = k_bounds + tl.load(p_idx + i // SPLIT)
        i_k = tl.load(p_tile).to(tl.int64) + i % SPLIT * TILE_K
        n_left = tl.load(p_tile + 1) - i_k
        b_k = load_tile(p_k, i_k * s_k[2], o_k, n_left, True)
        b_k1 = load_tile(p_k1, i_k * s_k[2], o_k, n_left, True)
        b_v = load_tile(p_v, i_k * s_v[2], o_k, n_left, True)
        b_v1 = load_tile(p_v1, i_k * s_v[2], o_k, n_left, True)
        b_s = scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale
        b_s = tl.where(o_k[None, :] < n_left, b_s, -float("inf"))
        b_o, b_o1, b_m, b_l = absorb(b_s, b_v, b_v1, b_o, b_o1, b_m, b_l, PRECISION)

    b_full = tl.where(b_l > 0, b_l, 1.0)  # a row without a key gives zeros and -inf
    if lse is not None:
        b_lse = (b_m + tl.log2(b_full)) * 0.6931471805599453
        tl.store(lse + i_bh * n_q + i_q + o_q, b_lse, mask=o_q < n_own)
    b_o = b_o / b_full[:, None]
    b_o1 = b_o1 / b_full[:, None]
    p_g = None
    p_g1 = None
    p_c = None
    p_c1 = None
    if gate is not None:
        x_g = gate + i_b * s_g[0] + i_h * s_g[1] + i_q * s_g[2]
        x_c = coarse + i_b * s_c[0] + i_h * s_c[1] + i_m * s_c[2]
        p_g = tile_pointers(x_g, s_g[2], s_g[3], BLOCK_Q, D0, 0)
        p_g1 = tile_pointers(x_g, s_g[2], s_g[3], BLOCK_Q, D1, D0)
        p_c = x_c + tl.arange(0, D0) * s_c[3]
        if D1 > 0:
            p_c1 = x_c + (D0 + tl.arange(0, D1)) * s_c[3]
    x_o = o + i_b * s_o[0] + i_h * s_o[1] + i_q * s_o[2]
    _finish(tile_pointers(x_o, s_o[2], s_o[3], BLOCK_Q, D0, 0), b_o, p_g, p_c, o_q, n_own)
    _finish(tile_pointers(x_o, s_o[2], s_o[3], BLOCK_Q, D1, D0), b_o1, p_g1, p_c1, o_q, n_own)


@triton.jit(do_not_specialize=["d"])
def _tile_means_fwd_kernel(
    x, bounds, means, s_x, d, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_x = tl.load(bounds + i_m).to(tl.int64)
    n_own = tl.load(bounds + i_m + 1) - i_x
    o_x = tl.arange(0, ROWS)
    o_d = tl.arange(0, COLUMNS)
    x_x = x + i_b.to(tl.int64) * s_x[0] + i_h.to(tl.int64) * s_x[1] + i_x * s_x[2]
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for i in range(0, BLOCK, ROWS):
        m_x = ((i + o_x)[:, None] < n_own) & (o_d < d)[None, :]
        p_x = x_x + (i + o_x)[:, None] * s_x[2] + o_d[None, :] * s_x[3]
        b_sum += tl.sum(tl.load(p_x, mask=m_x, other=0.0).to(tl.float32), 0)
    p_m = means + (i_bh * tl.num_programs(0) + i_m) * d + o_d
    tl.store(p_m, b_sum / n_own, mask=o_d < d)


def supports(q: Tensor, *, block_q: int = 64, block_k: int = 64, **_: object) -> str | None:
    """None if this file serves the call, else the reason why not."""
    return unsupported(q, block_q, block_k)


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
) -> tuple[Tensor, Tensor]:
    """See ops.ragged_attention; (O, LSE), O in the layout of q."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    launch = find("ragged", capability_of(q), q.shape[-1], table.block_q)
    bounds = (q_bounds, k_bounds)
    call = forward(q, k, v, out, lse, table, bounds, launch, scale, gate, coarse, whole)
    run(_ragged_attention_fwd_kernel, *call)
    return out, lse


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    table: BlockTable,
    bounds: tuple[Tensor, Tensor],
    launch: Launch,
    scale: float | None = None,
    gate: Tensor | None = None,
    coarse: Tensor | None = None,
    whole: Tensor | None = None,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the forward kernel."""
    d0, d1 = split_head_dim(q.shape[-1])
    whole = torch.zeros_like(table.counts) if whole is None else whole
    arguments = {
        "q": q, "k": k, "v": v, "o": out, "lse": lse, "indices": table.indices.contiguous(),
        "counts": table.counts.contiguous(), "whole": whole.contiguous(),
        "q_bounds": bounds[0], "k_bounds": bounds[1], "gate": gate, "coarse": coarse,
        "s_q": q.stride(), "s_k": k.stride(), "s_v": v.stride(), "s_o": out.stride(),
        "s_g": (0,) * 4 if gate is None else gate.stride(),
        "s_c": (0,) * 4 if gate is None else coarse.stride(),
        "n_q": q.shape[2], "width": table.indices.shape[-1], "scale": log2_scale(scale, q),
        "BLOCK_Q": table.block_q, "BLOCK_K": table.block_k,
        "TILE_K": min(launch.tile, table.block_k), "D0": d0, "D1": d1, "STAGES": launch.stages,
        "PRECISION": launch.precision,
    }  # fmt: skip
    return (table.counts.shape[2], q.shape[1], q.shape[0]), arguments, launch


def tile_means(x: Tensor, bounds: Tensor) -> Tensor:
    """See ops.tile_means."""
    batch, heads, _, d = x.shape
    means = x.new_empty((batch, heads, len(bounds) - 1, d), dtype=torch.float32)
    launch = find("means", capability_of(x), d, 128)
    arguments = {
        "x": x, "bounds": bounds, "means": means, "s_x": x.stride(), "d": d, "BLOCK": 128,
        "ROWS": 32, "COLUMNS": padded(d),
    }  # fmt: skip
    run(_tile_means_fwd_kernel, (len(bounds) - 1, heads, batch), arguments, launch)
    return means
