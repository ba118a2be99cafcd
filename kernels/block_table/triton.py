"""The block table on CUDA, in Triton: an exact top-k without a sort and without a host sync.

    score_nm = mean(q in n) · mean(k in m),   K = max(1, ceil(keep · M)) best of each row

q and k are read once. A score that K of a row reach is found by bisection between the least and the
largest, and so is the one above which a mass p of the softmax lies (top-p, arXiv 2511.19835). The
chosen blocks become words of 32 bits, and the bits before a word its place, so that rows come out
sorted. Scores are products of float32 means in three bfloat16 products each, of a mean's upper and
lower 8 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_table.means import query_key_means
from dit_accel.kernels.block_table.pool import beyond
from dit_accel.kernels.launch import Launch, capability_of, find, padded, run, unsupported
from dit_accel.kernels.tiles import log2_scale
from dit_accel.table import (
    BlockBits,
    BlockMeans,
    BlockTable,
    bit_words,
    block_count,
    kept_blocks,
    table_width,
)

# Scores are made for as many heads at once as fit in this many bytes, which stay in the L2 cache.
_SCORE_BYTES = 2**25
# Columns of block means per product: three tf32 products of more do not fit in the registers.
MEAN_TILE = 32


@triton.jit
def load_means(x, o_m, o_d, m, d):
    """Rows `o_m` and columns `o_d` of the [m, d] matrix at `x`, zero outside."""
    p_x = x + o_m[:, None] * d + o_d[None, :]
    return tl.load(p_x, mask=(o_m[:, None] < m) & (o_d[None, :] < d), other=0.0)


@triton.jit(do_not_specialize=["m_q", "m_k"])
def _block_scores_fwd_kernel(
    q, k, score, m_q, m_k, m_pad, d,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(2).to(tl.int64)
    o_q = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    o_k = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    b_s = tl.zeros([TILE_Q, TILE_K], tl.float32)
    for i_d in range(0, d, TILE_D):
        o_d = i_d + tl.arange(0, TILE_D)
        b_q = load_means(q + i_bh * m_q * d, o_q, o_d, m_q, d)
        b_k = load_means(k + i_bh * m_k * d, o_k, o_d, m_k, d)
        # [TQ, TD] @ [TD, TK] -> [TQ, TK]
        if PRECISION == "bf16x3":
            b_qh, b_kh = b_q.to(tl.bfloat16), b_k.to(tl.bfloat16)
            b_ql = (b_q - b_qh.to(tl.float32)).to(tl.bfloat16)
            b_kl = (b_k - b_kh.to(tl.float32)).to(tl.bfloat16)
            b_s = tl.dot(b_ql, tl.trans(b_kh), b_s)
            b_s = tl.dot(b_qh, tl.trans(b_kl), b_s)
            b_s = tl.dot(b_qh, tl.trans(b_kh), b_s)
        else:
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PRECISION)
    m_s = (o_q[:, None] < m_q) & (o_k[None, :] < m_k)
    tl.store(score + (i_bh * m_q + o_q[:, None]) * m_pad + o_k[None, :], b_s, mask=m_s)


@triton.jit
def _key(x):
    """int32 that sorts as the float32 does."""
    i = x.to(tl.int32, bitcast=True)
    return i ^ ((i >> 31) & 0x7FFFFFFF)


@triton.jit
def _between(low, high, step):
    """A key between two that differ by more than one: first of the mean of their floats, which
    lies among the scores, later their own mean, which ends after 32 steps."""
    x = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    y = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    middle = _key(0.5 * x + 0.5 * y)
    halves = (low >> 1) + (high >> 1) + (low & high & 1)
    return tl.where((step < 16) & (middle > low) & (middle < high), middle, halves)


@triton.jit
def _words(m_x, M: tl.constexpr):
    """The bits of a mask [M], 32 a word: [M // 32] int32."""
    b_bit = tl.full([32], 1, tl.int32) << tl.arange(0, 32)
    return tl.sum(tl.where(tl.reshape(m_x, [M // 32, 32]), b_bit[None, :], 0), 1)


@triton.jit
def _ones(b_w):
    """How many bits of each word are set."""
    b_w -= (b_w >> 1) & 0x55555555
    b_w = (b_w & 0x33333333) + ((b_w >> 2) & 0x33333333)
    b_w = (b_w + (b_w >> 4)) & 0x0F0F0F0F
    return (b_w * 0x01010101) >> 24


@triton.jit
def _lowest(b_w, n):
    """Of all bits of the words only the first n."""
    b_n = _ones(b_w)
    b_left = n - (tl.cumsum(b_n, 0) - b_n)
    b_out = b_w * 0
    for _ in tl.range(0, 32, loop_unroll_factor=1):
        b_low = b_w & -b_w
        b_out |= tl.where(b_left > 0, b_low, 0)
        b_w ^= b_low
        b_left -= 1
    return b_out


@triton.jit
def _store_places(b_w, p_row, width, M: tl.constexpr):
    """Store where the bits of the words are, ascending, and zeros up to the width; their number."""
    b_n = _ones(b_w)
    b_at = tl.cumsum(b_n, 0) - b_n
    b_first = 32 * tl.arange(0, M // 32)
    for _ in range(tl.max(b_n)):
        b_low = b_w & -b_w
        # of a power of two the exponent
        b_bit = ((b_low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
        tl.store(p_row + b_at, b_first + b_bit, mask=(b_w != 0) & (b_at < width))
        b_w ^= b_low
        b_at += 1
    n_all = tl.minimum(tl.sum(b_n), width)
    for i in range(n_all, width, 32):
        o_i = i + tl.arange(0, 32)
        tl.store(p_row + o_i, o_i * 0, mask=o_i < width)
    return n_all


@triton.jit(do_not_specialize=["i_first", "n_heads", "n_k", "m_k", "n_want", "width", "n_words"])
def _block_select_fwd_kernel(
    score, forced, near, indices, counts, bits, kv_len, wants, s_f, s_n,
    i_first, n_heads, n_k, m_k, m_pad, n_want, width, n_words, mass, scale,
    BLOCK_K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_row = i_bh.to(tl.int64) * tl.num_programs(0) + i_n
    i_b, i_h = (i_bh + i_first) // n_heads, (i_bh + i_first) % n_heads
    n_live = tl.cdiv(n_k, BLOCK_K)  # with kv_len, of all samples
    if kv_len is not None:
        n_k = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
        n_want = tl.load(wants + i_b)
    o_k = tl.arange(0, M)
    m_valid = o_k < tl.cdiv(n_k, BLOCK_K)
    b_s = tl.load(score + i_row * m_pad + o_k, mask=o_k < m_pad, other=0.0)
    m_free = m_valid
    m_kept = m_valid & False
    if forced is not None:
        p_f = (
            forced
            + i_b.to(tl.int64) * s_f[0]
            + i_h.to(tl.int64) * s_f[1]
            + i_n.to(tl.int64) * s_f[2]
        )
        m_kept = m_valid & (tl.load(p_f + o_k * s_f[3], mask=o_k < m_k, other=0) != 0)
        m_free = m_valid & (m_kept == 0)
    if mass is not None:
        b_size = tl.clamp((n_k - o_k * BLOCK_K).to(tl.float32), 1.0, BLOCK_K)
        b_s = b_s * scale + tl.log2(b_size)
        b_a = tl.where(m_valid, tl.exp2(b_s - tl.max(tl.where(m_valid, b_s, -float("inf")))), 0.0)
        b_a = b_a / tl.sum(b_a)
        held = tl.sum(tl.where(m_kept, b_a, 0.0))
    b_i = tl.where(m_free, _key(b_s), -2147483648)
    n_want = tl.minimum(n_want, tl.sum(m_free.to(tl.int32)))

    # of the scores at or above `least` there are n_want, or less without those equal to it
    first = tl.min(tl.where(m_free, b_i, 2147483647))
    last = tl.max(b_i)
    n_last = tl.sum((b_i == last).to(tl.int32))
    least = tl.where(n_last >= n_want, last, first)
    n_least = tl.where(n_last >= n_want, n_want, tl.sum(m_free.to(tl.int32)))
    above = last
    step = 0
    while (n_least != n_want) & (least < above - 1):
        middle = _between(least, above, step)
        n_over = tl.sum((b_i >= middle).to(tl.int32))
        enough = n_over >= n_want
        least = tl.where(enough, middle, least)
        n_least = tl.where(enough, n_over, n_least)
        above = tl.where(enough, above, middle)
        step += 1
    n_some = 0
    if mass is not None:
        b_a = tl.where(m_free, b_a, 0.0)
        lower = first
        above = last
        n_lower = tl.sum(m_free.to(tl.int32))
        n_above = n_last
        step = 0
        alone = held + tl.sum(tl.where(b_i == last, b_a, 0.0)) > mass
        while (n_lower - n_above > 1) & (lower < above - 1) & (alone == 0):
            middle = _between(lower, above, step)
            n_over = tl.sum((b_i >= middle).to(tl.int32))
            enough = held + tl.sum(tl.where(b_i >= middle, b_a, 0.0)) > mass
            lower = tl.where(enough, middle, lower)
            n_lower = tl.where(enough, n_over, n_lower)
            above = tl.where(enough, above, middle)
            n_above = tl.where(enough, n_above, n_over)
            step += 1
        # what lies between is one score, or equal ones
        lower = tl.where(alone, last, tl.max(tl.where(b_i < above, b_i, -2147483648)))
        # equal scores have equal shares: as many of them as pass p
        share = tl.max(tl.where(b_i == lower, b_a, 0.0))
        over = held + tl.sum(tl.where(b_i > lower, b_a, 0.0))
        n_some = tl.where(share > 0, tl.floor((mass - over) / share).to(tl.int32) + 1, M)
        n_some = tl.where(lower <= least, n_some, 0)
        least = tl.minimum(least, lower)

    b_w = _words(b_i > least, M)
    b_tie = _words(b_i == least, M)
    n_tie = tl.maximum(n_want - tl.sum(_ones(b_w)), n_some)
    if tl.sum(_ones(b_tie)) > n_tie:  # of equal scores, the lower blocks
        b_tie = _lowest(b_tie, n_tie)
    b_w |= b_tie
    if forced is not None:
        b_w |= _words(m_kept, M)
    if near is not None:
        m_near = tl.load(near + i_n * s_n[0] + o_k * s_n[1], mask=o_k < m_k, other=0) != 0
        b_w |= _words(m_near & m_valid, M)
    if bits is not None:
        o_w = tl.arange(0, M // 32)
        tl.store(bits + i_row * n_words + o_w, b_w | beyond(o_w, n_live), mask=o_w < n_words)
    tl.store(counts + i_row, _store_places(b_w, indices + i_row * width, width, M))


def supports(q: Tensor, *, block_q: int = 64, block_k: int = 64, **_: object) -> str | None:
    """None if this file serves the call, else the reason why not."""
    return unsupported(q, block_q, block_k)


def block_table(
    q: Tensor,
    k: Tensor,
    keep: float,
    block_q: int = 64,
    block_k: int = 64,
    forced: Tensor | None = None,
    kv_len: int | Tensor | None = None,
    max_forced: int | None = None,
    mass: float = 0.0,
    near: Tensor | None = None,
    max_near: int = 0,
    scale: float | None = None,
    return_means: bool = False,
    spreads: bool = False,
) -> BlockTable | tuple[BlockTable, BlockMeans]:
    """See ops.block_table; equal scores go to the lower block."""
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    m_q, m_k = block_count(n_q, block_q), block_count(n_k, block_k)
    limit = kv_len if isinstance(kv_len, int) else n_k
    most = block_count(limit, block_k)
    width = table_width(keep, most, 0 if forced is None else max_forced, mass, max_near)
    spreads = spreads and return_means
    (q_mean, q_far), (k_mean, k_far) = query_key_means(q, k, block_q, block_k, kv_len, spreads)
    indices = q.new_empty((batch, heads, m_q, width), dtype=torch.int32)
    counts = q.new_empty((batch, heads, m_q), dtype=torch.int32)
    bits = counts.new_empty((*counts.shape, bit_words(m_k))) if return_means else None
    select = {
        "kv_len": kv_len if isinstance(kv_len, Tensor) else None,
        "wants": _wanted(keep, kv_len, block_k) if isinstance(kv_len, Tensor) else None,
        "n_k": limit,
        "n_want": kept_blocks(keep, most),
        "BLOCK_K": block_k,
        "mass": mass if mass > 0 else None,
        "scale": log2_scale(scale, q) if mass > 0 else None,
        "near": None if near is None else near.view(torch.uint8),
        "s_n": (0, 0) if near is None else near.stride(),
    }
    if forced is not None:
        forced = forced.view(torch.uint8).expand(batch, heads, m_q, m_k)
    wanted = (q_mean, k_mean, indices, counts, bits)
    flat = [None if x is None else x.flatten(0, 1) for x in wanted]
    step = max(1, _SCORE_BYTES // (4 * m_q * m_k))
    for first in range(0, batch * heads, step):
        part = [None if x is None else x[first : first + step] for x in flat]
        _choose(*part, first, heads, forced, select)
    sizes = (block_q, block_k, n_q, n_k)
    if not return_means:
        return BlockTable(indices, counts, *sizes)
    table = BlockTable(indices, counts, *sizes, bits=BlockBits(bits, kv_len))
    return table, BlockMeans(q_mean, k_mean, q_far, k_far, kv_len)


def _wanted(keep: float, kv_len: Tensor, block_k: int) -> Tensor:
    """kept_blocks of each sample, [B] int32, without a host sync."""
    blocks = (kv_len + block_k - 1) // block_k
    return (keep * blocks.double() - 1e-6).ceil().clamp(min=1).int()


def _choose(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    counts: Tensor,
    bits: Tensor | None,
    first: int,
    heads: int,
    forced: Tensor | None,
    select: dict[str, object],
) -> None:
    """Scores and choice for the heads from `first` on; q, k [b, M, D] means, indices, counts and
    bits are written."""
    (n, m_q, d), m_k = q.shape, k.shape[1]
    m_pad = -(-m_k // 16) * 16  # rows that are read in whole vectors
    score = q.new_empty((n, m_q, m_pad))
    launch = find("scores", capability_of(q), d, 64)
    tile = launch.tile
    grid = (block_count(m_k, tile), block_count(m_q, tile), n)
    arguments = {
        "q": q, "k": k, "score": score, "m_q": m_q, "m_k": m_k, "m_pad": m_pad,
        "d": d, "TILE_Q": tile, "TILE_K": tile,
        "TILE_D": MEAN_TILE, "PRECISION": launch.precision if q.is_cuda else "ieee",
    }  # fmt: skip
    run(_block_scores_fwd_kernel, grid, arguments, launch)
    width = max(128, padded(m_k))
    arguments = {
        "score": score, "forced": forced, "indices": indices, "counts": counts,
        "bits": bits, "n_words": 0 if bits is None else bits.shape[-1],
        "s_f": (0, 0, 0, 0) if forced is None else forced.stride(), "i_first": first,
        "n_heads": heads,
        "m_k": m_k, "m_pad": m_pad, "width": indices.shape[-1], "M": width, **select,
    }  # fmt: skip
    launch = select_launch(width)
    run(_block_select_fwd_kernel, (m_q, n, 1), arguments, launch)


def select_launch(width: int) -> Launch:
    """One warp for each 1024 blocks of a row: with more a thread's share does not fit in its
    registers."""
    return Launch("select", 80, 128, 128, 16, min(16, max(1, width // 1024)), 1)
