"""Block means on CUDA, in Triton.

A mean is over the valid tokens of its block, in float32, and zero for a block without one. A
program has some columns of one block: they are independent, and a narrow tile stays in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import Launch, capability_of, find, padded, run
from dit_accel.table import block_count


@triton.jit
def mean_and_spread(x, far, s_x, i_b, i_h, i_m, n_valid, d, o_o, o_d, BLOCK: tl.constexpr):
    """The mean [C] of columns `o_d` of block i_m; its mean absolute deviation is written to `far`,
    if given."""
    o_n = i_m.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = (o_n[:, None] < n_valid) & (o_d[None, :] < d)
    x_x = x + i_b.to(tl.int64) * s_x[0] + i_h.to(tl.int64) * s_x[1]
    # [BLOCK, C]
    p_x = x_x + o_n[:, None] * s_x[2] + o_d[None, :] * s_x[3]
    b_x = tl.load(p_x, mask=m_x, other=0.0)
    size = tl.clamp((n_valid - i_m * BLOCK).to(tl.float32), 1.0, BLOCK)
    # [BLOCK, C] -> [C]
    b_mean = tl.sum(b_x.to(tl.float32), 0) / size
    if far is not None:
        b_far = tl.where(m_x, tl.abs(b_x.to(tl.float32) - b_mean[None, :]), 0.0)
        b_far = tl.sum(b_far, 0) / size
        tl.store(far + o_o, b_far.to(far.dtype.element_ty), mask=o_d < d)
    return b_mean


@triton.jit
def _store_mean(x, mean, far, s_x, i_b, i_h, i_m, n_valid, m, d, o_d, BLOCK: tl.constexpr):
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    o_o = (i_bh * m + i_m) * d + o_d
    b_mean = mean_and_spread(x, far, s_x, i_b, i_h, i_m, n_valid, d, o_o, o_d, BLOCK)
    tl.store(mean + o_o, b_mean, mask=o_d < d)


@triton.jit(do_not_specialize=["n_q", "n", "m_q", "m_k"])
def _block_means_fwd_kernel(
    q, k, q_mean, k_mean, q_far, k_far, kv_len, s_q, s_k, n_q, n, m_q, m_k, d,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_m = tl.program_id(0) // PARTS
    o_d = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    if i_m < m_q:
        _store_mean(q, q_mean, q_far, s_q, i_b, i_h, i_m, n_q, m_q, d, o_d, BLOCK_Q)
    else:
        n_valid = n
        if kv_len is not None:
            n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n)
        i_m -= m_q
        _store_mean(k, k_mean, k_far, s_k, i_b, i_h, i_m, n_valid, m_k, d, o_d, BLOCK_K)


def block_means(
    x: Tensor, block: int, kv_len: int | Tensor | None = None, spread: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Means of the blocks of x [B, H, N, D], float32 [B, H, M, D], and with `spread` the mean
    absolute deviations from them, in the dtype of x."""
    return query_key_means(x[:, :, :0], x, block, block, kv_len, spread)[1]


def query_key_means(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    kv_len: int | Tensor | None = None,
    spread: bool = False,
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """`block_means` of q and of k, whose tokens end at kv_len, in one launch."""
    (batch, heads, n_q, d), n_k = q.shape, k.shape[2]
    m_q, m_k = block_count(n_q, block_q), block_count(n_k, block_k)
    means = [q.new_empty((batch, heads, m, d), dtype=torch.float32) for m in (m_q, m_k)]
    far = [torch.empty_like(x, dtype=q.dtype) if spread else None for x in means]
    op = "spreads" if spread else "means"
    launch = find(op, capability_of(q), d, max(block_q, block_k))
    columns = column_tiles(d, launch)
    arguments = {
        "q": q, "k": k, "q_mean": means[0], "k_mean": means[1], "q_far": far[0], "k_far": far[1],
        **tokens(n_k, kv_len), "s_q": q.stride(), "s_k": k.stride(), "n_q": n_q, "m_q": m_q,
        "m_k": m_k, "d": d, "BLOCK_Q": block_q, "BLOCK_K": block_k, **columns,
    }  # fmt: skip
    grid = ((m_q + m_k) * columns["PARTS"], heads, batch)
    run(_block_means_fwd_kernel, grid, arguments, launch)
    return (means[0], far[0]), (means[1], far[1])


def tokens(n: int, kv_len: int | Tensor | None) -> dict[str, Tensor | int | None]:
    """The kernel arguments that say how many of n tokens are valid."""
    if isinstance(kv_len, Tensor):
        return {"kv_len": kv_len, "n": n}
    return {"kv_len": None, "n": n if kv_len is None else min(n, kv_len)}


def column_tiles(d: int, launch: Launch) -> dict[str, int]:
    """The kernel arguments that split d columns among programs."""
    columns = min(launch.tile, padded(d))
    return {"COLUMNS": columns, "PARTS": block_count(d, columns)}
