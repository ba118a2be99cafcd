"""Block means on CUDA, in Triton, and a table as bytes or bits for each block.

A mean is over the valid tokens of its block, in float32, and zero for a block without one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import capability_of, find, padded, run
from dit_accel.table import BlockTable, block_count

ROW_LAUNCH = find("rows", 80, 128, 128)
WORDS_LAUNCH = replace(ROW_LAUNCH, warps=1)


@triton.jit
def _mean_and_spread(x, far, s_x, i_b, i_h, i_m, n_valid, d, o_o, BLOCK: tl.constexpr, o_d):
    """The mean [D] of block i_m; its mean absolute deviation is written to `far`, if given."""
    o_n = i_m.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = (o_n[:, None] < n_valid) & (o_d[None, :] < d)
    x_x = x + i_b.to(tl.int64) * s_x[0] + i_h.to(tl.int64) * s_x[1]
    # [BLOCK, D]
    p_x = x_x + o_n[:, None] * s_x[2] + o_d[None, :] * s_x[3]
    b_x = tl.load(p_x, mask=m_x, other=0.0)
    size = tl.clamp((n_valid - i_m * BLOCK).to(tl.float32), 1.0, BLOCK)
    # [BLOCK, D] -> [D]
    b_mean = tl.sum(b_x.to(tl.float32), 0) / size
    if far is not None:
        # read anew, from the cache: held in registers, the tile leaves places for fewer programs
        b_x = tl.load(p_x, mask=m_x, other=0.0, eviction_policy="evict_first")
        b_far = tl.where(m_x, tl.abs(b_x.to(tl.float32) - b_mean[None, :]), 0.0)
        b_far = tl.sum(b_far, 0) / size
        tl.store(far + o_o, b_far.to(far.dtype.element_ty), mask=o_d < d)
    return b_mean


@triton.jit
def _store_mean(
    x, mean, far, s_x, i_b, i_h, i_m, n_valid, m, d, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    o_d = tl.arange(0, BLOCK_D)
    o_o = (i_bh * m + i_m) * d + o_d
    b_mean = _mean_and_spread(x, far, s_x, i_b, i_h, i_m, n_valid, d, o_o, BLOCK, o_d)
    tl.store(mean + o_o, b_mean, mask=o_d < d)


@triton.jit(do_not_specialize=["n"])
def _block_mean_fwd_kernel(
    x, mean, far, kv_len, s_x, n, d, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_valid = n
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n)
    m = tl.num_programs(0)
    _store_mean(x, mean, far, s_x, i_b, i_h, i_m, n_valid, m, d, BLOCK, BLOCK_D)


@triton.jit(do_not_specialize=["n_q", "n", "m_q", "m_k"])
def _block_mean_pair_fwd_kernel(
    q, k, q_mean, k_mean, q_far, k_far, kv_len, s_q, s_k, n_q, n, m_q, m_k, d,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_m < m_q:
        _store_mean(q, q_mean, q_far, s_q, i_b, i_h, i_m, n_q, m_q, d, BLOCK_Q, BLOCK_D)
    else:
        n_valid = n
        if kv_len is not None:
            n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n)
        i_m -= m_q
        _store_mean(k, k_mean, k_far, s_k, i_b, i_h, i_m, n_valid, m_k, d, BLOCK_K, BLOCK_D)


@triton.jit(do_not_specialize=["n", "m_known"])
def _block_pool_fwd_kernel(
    k, v, known, k_mean, k_rest, k_far, v_mean, kv_len, s_k, s_v, n, m_known, d,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_valid = n
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    o_d = tl.arange(0, BLOCK_D)
    o_o = (i_bh * tl.num_programs(0) + i_m) * d + o_d
    m_d = o_d < d
    if known is not None:
        o_k = i_m * d + o_d
        b_k = tl.load(known + i_bh * m_known * d + o_k, mask=m_d & (o_k < m_known * d), other=0.0)
    else:
        b_k = _mean_and_spread(k, k_far, s_k, i_b, i_h, i_m, n_valid, d, o_o, BLOCK, o_d)
    b_m = b_k.to(k_mean.dtype.element_ty)
    tl.store(k_mean + o_o, b_m, mask=m_d)
    if k_rest is not None:
        tl.store(k_rest + o_o, (b_k - b_m.to(tl.float32)).to(k_rest.dtype.element_ty), mask=m_d)
    b_v = _mean_and_spread(v, None, s_v, i_b, i_h, i_m, n_valid, d, o_o, BLOCK, o_d)
    tl.store(v_mean + o_o, b_v.to(v_mean.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["width", "m_pad"])
def _kept_map_fwd_kernel(indices, counts, kept, width, m_pad, BLOCK: tl.constexpr):
    p_kept = kept + tl.program_id(0).to(tl.int64) * m_pad
    p_row = indices + tl.program_id(0).to(tl.int64) * width
    n_kept = tl.load(counts + tl.program_id(0))
    o_i = tl.arange(0, BLOCK)
    for i in range(0, m_pad, BLOCK):
        tl.store(p_kept + i + o_i, tl.zeros([BLOCK], tl.uint8), mask=i + o_i < m_pad)
    tl.debug_barrier()  # the ones come after the zeros
    for i in range(0, n_kept, BLOCK):
        b_i = tl.load(p_row + i + o_i, mask=i + o_i < n_kept, other=0)
        tl.store(p_kept + b_i, tl.full([BLOCK], 1, tl.uint8), mask=i + o_i < n_kept)


@triton.jit(do_not_specialize=["width", "n_words", "live"])
def _kept_bits_fwd_kernel(
    indices, counts, bits, width, n_words, live, BLOCK: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    n_kept = tl.load(counts + i_row)
    o_i = tl.arange(0, BLOCK)
    for i_w in range(0, n_words, WORDS):
        o_w = i_w + tl.arange(0, WORDS)
        b_w = tl.zeros([WORDS], tl.int32)
        for i in range(0, n_kept, BLOCK):
            b_i = tl.load(indices + i_row * width + i + o_i, mask=i + o_i < n_kept, other=-1)
            b_bit = tl.full([BLOCK], 1, tl.int32) << (b_i & 31)
            # no block comes twice, so that a sum of bits is their union
            b_here = ((b_i >> 5)[:, None] == o_w[None, :]) & (b_i < live)[:, None]
            b_w += tl.sum(tl.where(b_here, b_bit[:, None], 0), 0)
        n_live = live - 32 * o_w
        b_beyond = tl.full([WORDS], -1, tl.int32) << tl.minimum(tl.maximum(n_live, 0), 31)
        b_w |= tl.where(n_live < 32, b_beyond, 0)
        tl.store(bits + i_row * n_words + o_w, b_w, mask=o_w < n_words)


def block_means(
    x: Tensor, block: int, kv_len: int | Tensor | None = None, spread: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Means of the blocks of x [B, H, N, D], float32 [B, H, M, D], and with `spread` the mean
    absolute deviations from them, in the dtype of x."""
    batch, heads, n, d = x.shape
    mean = x.new_empty((batch, heads, block_count(n, block), d), dtype=torch.float32)
    far = torch.empty_like(mean, dtype=x.dtype) if spread else None
    arguments = {
        "x": x, "mean": mean, "far": far, **_tokens(n, kv_len), "s_x": x.stride(), "d": d,
        "BLOCK": block, "BLOCK_D": padded(d),
    }  # fmt: skip
    launch = find("means", capability_of(x), d, block)
    run(_block_mean_fwd_kernel, (mean.shape[2], heads, batch), arguments, launch)
    return mean, far


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
    arguments = {
        "q": q, "k": k, "q_mean": means[0], "k_mean": means[1], "q_far": far[0], "k_far": far[1],
        **_tokens(n_k, kv_len), "s_q": q.stride(), "s_k": k.stride(), "n_q": n_q, "m_q": m_q,
        "m_k": m_k, "d": d, "BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": padded(d),
    }  # fmt: skip
    launch = find("means", capability_of(q), d, max(block_q, block_k))
    run(_block_mean_pair_fwd_kernel, (m_q + m_k, heads, batch), arguments, launch)
    return (means[0], far[0]), (means[1], far[1])


def pooled_blocks(
    k: Tensor,
    v: Tensor,
    block: int,
    kv_len: int | Tensor | None = None,
    known: Tensor | None = None,
    rest: bool = False,
    spread: bool = False,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Means of k and v, [B, H, M, D] in their dtype, M rounded up to `multiple`; what rounding took
    from those of k (with `rest`) in that dtype too, and k's deviations (with `spread`).

    known: float32 [B, H, Mk, D], the means of k: then only v is read, and there are no deviations.
    """
    batch, heads, n, d = k.shape
    m = -(-block_count(n, block) // multiple) * multiple
    k_mean, v_mean = (x.new_empty((batch, heads, m, d)) for x in (k, v))
    lost = torch.empty_like(k_mean) if rest else None
    far = torch.empty_like(k_mean) if spread and known is None else None
    arguments = {
        "k": k, "v": v, "known": known, "k_mean": k_mean, "k_rest": lost, "k_far": far,
        "v_mean": v_mean, **_tokens(n, kv_len), "s_k": k.stride(), "s_v": v.stride(),
        "m_known": block_count(n, block), "d": d, "BLOCK": block, "BLOCK_D": padded(d),
    }  # fmt: skip
    launch = find("means", capability_of(k), d, block)
    run(_block_pool_fwd_kernel, (m, heads, batch), arguments, launch)
    return k_mean, v_mean, lost, far


def _tokens(n: int, kv_len: int | Tensor | None) -> dict[str, Tensor | int | None]:
    if isinstance(kv_len, Tensor):
        return {"kv_len": kv_len, "n": n}
    return {"kv_len": None, "n": n if kv_len is None else min(n, kv_len)}


def kept_map(table: BlockTable) -> Tensor:
    """[B, H, Mq, Mk] uint8, 1 where the table keeps the block."""
    m = table.key_blocks
    kept = table.indices.new_empty((*table.counts.shape, m), dtype=torch.uint8)
    arguments = {
        "indices": table.indices.contiguous(), "counts": table.counts.contiguous(), "kept": kept,
        "width": table.indices.shape[-1], "m_pad": m, "BLOCK": 512,
    }  # fmt: skip
    run(_kept_map_fwd_kernel, (table.counts.numel(), 1, 1), arguments, ROW_LAUNCH)
    return kept


def kept_bits(table: BlockTable, kv_len: int | Tensor | None = None) -> Tensor:
    """[B, H, Mq, W] int32: bit m % 32 of word m // 32 is 1 where the table keeps block m, and
    beyond the blocks of kv_len, unless that is a tensor. The words are those of whole 128 blocks.
    """
    live = block_count(_tokens(table.n_k, kv_len)["n"], table.block_k)
    n_words = 4 * block_count(table.key_blocks, 128)
    bits = table.indices.new_empty((*table.counts.shape, n_words), dtype=torch.int32)
    arguments = {
        "indices": table.indices.contiguous(), "counts": table.counts.contiguous(), "bits": bits,
        "width": table.indices.shape[-1], "n_words": n_words, "live": live, "BLOCK": 32,
        "WORDS": 64,
    }  # fmt: skip
    run(_kept_bits_fwd_kernel, (table.counts.numel(), 1, 1), arguments, WORDS_LAUNCH)
    return bits
