"""Block means on CUDA, in Triton.

A mean is over the valid tokens of its block, in float32, and zero for a block without one. A
program has some columns of one block: they are independent, and a narrow tile stays in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import Launch, capability_of, find, padded, run
from dit_accel.table import block_count


@triton.jit
def load_means(x, o_m, o_d, m, d):
    """Rows `o_m` and columns `o_d` of the [m, d] matrix at `x`, zero outside."""
    p_x = x + o_m[:, None] * d + o_d[None, :]
    return tl.load(p_x, mask=(o_m[:, None] < m) & (o_d[None, :] < d), other=0.0)


@triton.jit
def mean_and_spread(
    x, far, sub, s_x, i_b, i_h, i_m, n_valid, d, o_o, o_d, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """The mean [C] of columns `o_d` of block i_m; its mean absolute deviation is written to `far`
    and the means of its PARTS parts to `sub`, if given."""
    o_n = i_m.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = (o_n[:, None] < n_valid) & (o_d[None, :] < d)
    x_x = x + i_b.to(tl.int64) * s_x[0] + i_h.to(tl.int64) * s_x[1]
    # [BLOCK, C]
    p_x = x_x + o_n[:, None] * s_x[2] + o_d[None, :] * s_x[3]
    b_x = tl.load(p_x, mask=m_x, other=0.0)
    size = tl.clamp((n_valid - i_m * BLOCK).to(tl.float32), 1.0, BLOCK)
    if sub is not None:
        SIZE: tl.constexpr = BLOCK // PARTS
        o_p = tl.arange(0, PARTS)
        # [BLOCK, C] -> [PARTS, SIZE, C] -> [PARTS, C] -> [C]
        b_sub = tl.sum(tl.reshape(b_x.to(tl.float32), [PARTS, SIZE, b_x.shape[1]]), 1)
        b_mean = tl.sum(b_sub, 0) / size
        b_size = tl.clamp((n_valid - i_m * BLOCK - o_p * SIZE).to(tl.float32), 1.0, SIZE)
        b_sub = (b_sub / b_size[:, None]).to(sub.dtype.element_ty)
        p_sub = sub + ((o_o - o_d) * PARTS + o_d)[None, :] + o_p[:, None] * d
        tl.store(p_sub, b_sub, mask=(o_d < d)[None, :])
    else:
        # [BLOCK, C] -> [C]
        b_mean = tl.sum(b_x.to(tl.float32), 0) / size
    if far is not None:
        b_far = tl.where(m_x, tl.abs(b_x.to(tl.float32) - b_mean[None, :]), 0.0)
        b_far = tl.sum(b_far, 0) / size
        tl.store(far + o_o, b_far.to(far.dtype.element_ty), mask=o_d < d)
    return b_mean


@triton.jit
def _store_mean(
    x, mean, far, sub, s_x, i_b, i_h, i_m, n_valid, m, d, o_d, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    o_o = (i_bh * m + i_m) * d + o_d
    b_mean = mean_and_spread(x, far, sub, s_x, i_b, i_h, i_m, n_valid, d, o_o, o_d, BLOCK, PARTS)
    tl.store(mean + o_o, b_mean, mask=o_d < d)


@triton.jit(do_not_specialize=["n_q", "n", "m_q", "m_k"])
def _block_means_fwd_kernel(
    q, k, q_mean, k_mean, q_far, k_far, q_sub, k_sub, kv_len, s_q, s_k, n_q, n, m_q, m_k, d,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_m = tl.program_id(0) // SPLITS
    o_d = tl.program_id(0) % SPLITS * COLUMNS + tl.arange(0, COLUMNS)
    if i_m < m_q:
        _store_mean(q, q_mean, q_far, q_sub, s_q, i_b, i_h, i_m, n_q, m_q, d, o_d, BLOCK_Q, PARTS)
    else:
        n_valid = n
        if kv_len is not None:
            n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n)
        i_m -= m_q
        _store_mean(
            k, k_mean, k_far, k_sub, s_k, i_b, i_h, i_m, n_valid, m_k, d, o_d, BLOCK_K, PARTS
        )


def block_means(
    x: Tensor, block: int, kv_len: int | Tensor | None = None, spread: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Means of the blocks of x [B, H, N, D], float32 [B, H, M, D], and with `spread` the mean
    absolute deviations from them, in the dtype of x."""
    return query_key_means(x[:, :, :0], x, block, block, kv_len, spread)[1][:2]


class Means(NamedTuple):
    """Of one side's blocks: means [B, H, M, D] float32, mean absolute deviations of that shape and
    means of their parts [B, H, M · parts, D], both in the dtype of the tokens, if asked for."""

    mean: Tensor
    far: Tensor | None
    sub: Tensor | None


def query_key_means(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    kv_len: int | Tensor | None = None,
    spread: bool = False,
    parts: int = 1,
) -> tuple[Means, Means]:
    """`Means` of q and of k, whose tokens end at kv_len, in one launch; a block of several parts is
    read once for all."""
    (batch, heads, n_q, d), n_k = q.shape, k.shape[2]
    m_q, m_k = block_count(n_q, block_q), block_count(n_k, block_k)
    means = [q.new_empty((batch, heads, m, d), dtype=torch.float32) for m in (m_q, m_k)]
    far = [torch.empty_like(x, dtype=q.dtype) if spread else None for x in means]
    sub = [q.new_empty((batch, heads, m * parts, d)) if parts > 1 else None for m in (m_q, m_k)]
    op = "spreads" if spread else "means" if parts == 1 else "parts"
    launch = find(op, capability_of(q), d, max(block_q, block_k))
    columns = column_tiles(d, launch)
    arguments = {
        "q": q, "k": k, "q_mean": means[0], "k_mean": means[1], "q_far": far[0], "k_far": far[1],
        "q_sub": sub[0], "k_sub": sub[1],
        **tokens(n_k, kv_len), "s_q": q.stride(), "s_k": k.stride(), "n_q": n_q, "m_q": m_q,
        "m_k": m_k, "d": d, "BLOCK_Q": block_q, "BLOCK_K": block_k, "PARTS": parts, **columns,
    }  # fmt: skip
    grid = ((m_q + m_k) * columns["SPLITS"], heads, batch)
    run(_block_means_fwd_kernel, grid, arguments, launch)
    return Means(means[0], far[0], sub[0]), Means(means[1], far[1], sub[1])


def tokens(n: int, kv_len: int | Tensor | None) -> dict[str, Tensor | int | None]:
    """The kernel arguments that say how many of n tokens are valid."""
    if isinstance(kv_len, Tensor):
        return {"kv_len": kv_len, "n": n}
    return {"kv_len": None, "n": n if kv_len is None else min(n, kv_len)}


def column_tiles(d: int, launch: Launch) -> dict[str, int]:
    """The kernel arguments that split d columns among programs."""
    columns = min(launch.tile, padded(d))
    return {"COLUMNS": columns, "SPLITS": block_count(d, columns)}
