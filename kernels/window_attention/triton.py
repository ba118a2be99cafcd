"""Dense attention and the window's part of it in one pass on CUDA, in Triton.

One program per query block and one accumulator: it visits the blocks of the window, stores what it
has, and goes on through the other keys. The loop over all keys reads a byte per block to leave out
the window's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import (
    Launch,
    capability_of,
    find,
    run,
    split_head_dim,
    unsupported,
)
from dit_accel.kernels.tiles import (
    absorb,
    key_limits,
    load_tile,
    log2_scale,
    scores,
    tile_pointers,
    whole_blocks,
)
from dit_accel.table import BlockTable


@triton.jit
def _visit(
    b_q, b_q1, p_k, p_k1, p_v, p_v1, i_k, s_kn, s_vn, o_k, n_left, b_out, scale,
    b_o, b_o1, b_m, b_l, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the keys from i_k on, unless `b_out`; if MASKED only to the first `n_left`."""
    i_k = tl.cast(i_k, tl.int64)
    b_k = load_tile(p_k, i_k * s_kn, o_k, n_left, MASKED)
    b_v = load_tile(p_v, i_k * s_vn, o_k, n_left, MASKED)
    b_k1 = load_tile(p_k1, i_k * s_kn, o_k, n_left, MASKED)
    b_v1 = load_tile(p_v1, i_k * s_vn, o_k, n_left, MASKED)
    b_s = scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale
    if MASKED:
        b_s = tl.where(o_k[None, :] < n_left, b_s, -float("inf"))
    if b_out is not None:
        b_s = tl.where(b_out, -float("inf"), b_s)
    return absorb(b_s, b_v, b_v1, b_o, b_o1, b_m, b_l, PRECISION)


@triton.jit
def _store(
    o, lse, b_o, b_o1, b_m, b_l, s_o, o_q, n_q,
    BLOCK_Q: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Output and LSE of an accumulator; zeros and −inf for a row without a key."""
    b_full = tl.where(b_l > 0, b_l, 1.0)
    tl.store(lse + o_q, (b_m + tl.log2(b_full)) * 0.6931471805599453, mask=o_q < n_q)
    p_o = tile_pointers(o, s_o[2], s_o[3], BLOCK_Q, D0, 0)
    tl.store(p_o, (b_o / b_full[:, None]).to(o.dtype.element_ty), mask=o_q[:, None] < n_q)
    if D1 > 0:
        p_o1 = tile_pointers(o, s_o[2], s_o[3], BLOCK_Q, D1, D0)
        tl.store(p_o1, (b_o1 / b_full[:, None]).to(o.dtype.element_ty), mask=o_q[:, None] < n_q)


@triton.jit(do_not_specialize=["n_q", "n_k", "width"])
def _window_attention_fwd_kernel(
    q, k, v, full, window, full_lse, window_lse, indices, counts, kept, kv_len,
    s_q, s_k, s_v, s_o, n_q, n_k, width, m_k, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, PADDED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_row = i_bh * tl.num_programs(0) + i_m
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    p_idx = indices + i_row * width
    n_kept = tl.load(counts + i_row)
    n_whole = whole_blocks(p_idx, n_kept, n_valid, BLOCK_K, PADDED)

    i_q = i_m.to(tl.int64) * BLOCK_Q
    o_q = i_m * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, TILE_K)
    x_q = q + i_b.to(tl.int64) * s_q[0] + i_h.to(tl.int64) * s_q[1] + i_q * s_q[2]
    x_k = k + i_b.to(tl.int64) * s_k[0] + i_h.to(tl.int64) * s_k[1]
    x_v = v + i_b.to(tl.int64) * s_v[0] + i_h.to(tl.int64) * s_v[1]
    x_o = i_b.to(tl.int64) * s_o[0] + i_h.to(tl.int64) * s_o[1] + i_q * s_o[2]
    b_q = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D0, 0), 0, o_q, n_q, True)
    b_q1 = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D1, D0), 0, o_q, n_q, True)
    p_k = tile_pointers(x_k, s_k[2], s_k[3], TILE_K, D0, 0)
    p_k1 = tile_pointers(x_k, s_k[2], s_k[3], TILE_K, D1, D0)
    p_v = tile_pointers(x_v, s_v[2], s_v[3], TILE_K, D0, 0)
    p_v1 = tile_pointers(x_v, s_v[2], s_v[3], TILE_K, D1, D0)
    b_o = tl.zeros([BLOCK_Q, D0], tl.float32)
    b_o1 = tl.zeros([BLOCK_Q, D1 if D1 > 0 else 1], tl.float32)
    b_m = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_Q], tl.float32)

    for i in tl.range(0, n_whole * SPLIT, num_stages=STAGES):
        i_k = tl.load(p_idx + i // SPLIT) * BLOCK_K + i % SPLIT * TILE_K
        b_o, b_o1, b_m, b_l = _visit(
            b_q, b_q1, p_k, p_k1, p_v, p_v1, i_k, s_k[2], s_v[2], o_k, n_k, None, scale,
            b_o, b_o1, b_m, b_l, False, PRECISION,
        )  # fmt: skip
    for i in tl.range(n_whole * SPLIT, n_kept * SPLIT, num_stages=1):
        i_k = tl.load(p_idx + i // SPLIT) * BLOCK_K + i % SPLIT * TILE_K
        b_o, b_o1, b_m, b_l = _visit(
            b_q, b_q1, p_k, p_k1, p_v, p_v1, i_k, s_k[2], s_v[2], o_k, n_valid - i_k, None, scale,
            b_o, b_o1, b_m, b_l, True, PRECISION,
        )  # fmt: skip
    _store(
        window + x_o, window_lse + i_bh * n_q, b_o, b_o1, b_m, b_l, s_o, o_q, n_q, BLOCK_Q, D0, D1
    )

    p_kept = kept + i_row * m_k
    n_tiles = n_valid // TILE_K
    for i in tl.range(0, n_tiles, num_stages=STAGES):
        b_out = tl.load(p_kept + i // SPLIT) != 0
        b_o, b_o1, b_m, b_l = _visit(
            b_q, b_q1, p_k, p_k1, p_v, p_v1, i * TILE_K, s_k[2], s_v[2], o_k, n_k, b_out, scale,
            b_o, b_o1, b_m, b_l, False, PRECISION,
        )  # fmt: skip
    for i in tl.range(n_tiles, tl.cdiv(n_valid, TILE_K), num_stages=1):
        b_out = tl.load(p_kept + i // SPLIT) != 0
        b_o, b_o1, b_m, b_l = _visit(
            b_q, b_q1, p_k, p_k1, p_v, p_v1, i * TILE_K, s_k[2], s_v[2], o_k, n_valid - i * TILE_K,
            b_out, scale, b_o, b_o1, b_m, b_l, True, PRECISION,
        )  # fmt: skip
    _store(full + x_o, full_lse + i_bh * n_q, b_o, b_o1, b_m, b_l, s_o, o_q, n_q, BLOCK_Q, D0, D1)


def supports(q: Tensor, *, block_q: int = 64, block_k: int = 64, **_: object) -> str | None:
    """None if this file serves the call, else the reason why not."""
    return unsupported(q, block_q, block_k)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output over all keys, output over the table's, and their LSEs; see ops.window_attention."""
    full, window = torch.empty_like(q), torch.empty_like(q)
    lse = [q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2)]
    launch = find("window", capability_of(q), q.shape[-1], table.block_q)
    run(
        _window_attention_fwd_kernel,
        *forward(q, k, v, full, window, lse, table, launch, scale, kv_len),
    )
    return full, window, *lse


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    full: Tensor,
    window: Tensor,
    lse: list[Tensor],
    table: BlockTable,
    launch: Launch,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> tuple[tuple[int, ...], dict[str, Any], Launch]:
    """Grid, arguments and launch of the kernel; both outputs share their strides."""
    d0, d1 = split_head_dim(q.shape[-1])
    arguments = {
        "q": q, "k": k, "v": v, "full": full, "window": window,
        "full_lse": lse[0], "window_lse": lse[1],
        "indices": table.indices.contiguous(), "counts": table.counts.contiguous(),
        "kept": table.to_mask().to(torch.uint8), **key_limits(k, kv_len),
        "s_q": q.stride(), "s_k": k.stride(), "s_v": v.stride(), "s_o": full.stride(),
        "n_q": q.shape[2], "width": table.indices.shape[-1], "m_k": table.key_blocks,
        "scale": log2_scale(scale, q), "BLOCK_Q": table.block_q, "BLOCK_K": table.block_k,
        "TILE_K": min(launch.tile, table.block_k), "D0": d0, "D1": d1, "STAGES": launch.stages,
        "PRECISION": launch.precision,
    }  # fmt: skip
    return (table.counts.shape[2], q.shape[1], q.shape[0]), arguments, launch
