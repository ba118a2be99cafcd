"""What comes before and after Hopper's gradients, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.tiles import load_tile, tile_pointers


@triton.jit(do_not_specialize=["n_q", "n_stats"])
def _block_sparse_attention_bwd_stats_kernel(
    o, do, lse, dlse, stats, s_o, s_do, n_q, n_stats, D: tl.constexpr
):  # fmt: skip
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    o_t = tl.arange(0, 64)
    o_q = i_t * 64 + o_t
    i_b, i_h, i_q = i_b.to(tl.int64), i_h.to(tl.int64), i_t.to(tl.int64) * 64
    x_o = o + i_b * s_o[0] + i_h * s_o[1] + i_q * s_o[2]
    x_do = do + i_b * s_do[0] + i_h * s_do[1] + i_q * s_do[2]
    b_o = load_tile(tile_pointers(x_o, s_o[2], s_o[3], 64, D, 0), 0, o_q, n_q, True)
    b_do = load_tile(tile_pointers(x_do, s_do[2], s_do[3], 64, D, 0), 0, o_q, n_q, True)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + i_bh * n_q + o_q, mask=o_q < n_q, other=0.0)
    b_lse = tl.load(lse + i_bh * n_q + o_q, mask=o_q < n_q, other=float("inf"))
    b_lse = tl.where(b_lse == -float("inf"), float("inf"), b_lse) * 1.4426950408889634
    p_stats = stats + (i_bh * n_stats + i_t) * 128 + o_t
    tl.store(p_stats, b_lse)
    tl.store(p_stats + 64, b_delta)


@triton.jit(do_not_specialize=["n_q", "n_stats"])
def _block_sparse_attention_bwd_sum_kernel(total, dq, s_dq, n_q, n_stats, scale, D: tl.constexpr):
    """dq of its sum, whose tiles [64, D] lie as accumulators do: four numbers of a thread, two of
    a row and two of the row eight further, then 32 threads, then eight columns."""
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    x = tl.load(total + (i_bh * n_stats + i_t) * (64 * D) + tl.arange(0, 64 * D))
    x = tl.reshape(x, (4, D // 8, 8, 4, 2, 2))
    b_dq = tl.reshape(tl.permute(x, (0, 4, 2, 1, 3, 5)), (64, D))
    o_q = i_t * 64 + tl.arange(0, 64)
    i_b, i_h, i_q = i_b.to(tl.int64), i_h.to(tl.int64), i_t.to(tl.int64) * 64
    x_dq = dq + i_b * s_dq[0] + i_h * s_dq[1] + i_q * s_dq[2]
    p_dq = tile_pointers(x_dq, s_dq[2], s_dq[3], 64, D, 0)
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=o_q[:, None] < n_q)
