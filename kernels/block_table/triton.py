"""The block table on CUDA, in Triton.

    score_nm = mean(q in n) · mean(k in m),   K = max(1, ceil(keep · M)) best of each row

q and k are read once. Scores are products of float32 means in three bfloat16 products each, of a
mean's upper and lower 8 bits; of blocks in parts see sub.py, of the choice select.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_table.means import load_means, query_key_means
from dit_accel.kernels.block_table.select import Rules, choose
from dit_accel.kernels.block_table.sub import levels
from dit_accel.kernels.launch import capability_of, find, run, too_old, unsupported
from dit_accel.kernels.tiles import log2_scale
from dit_accel.table import BlockBits, BlockMeans, BlockTable, Keep, bit_words, block_count

# Scores are made for as many heads at once as fit in this many bytes, which stay in the L2 cache.
_SCORE_BYTES = 2**25
# Those of parts are more than the cache holds: fewer launches are worth more (an H200,
# benchmarks/results/h200-select.json).
_LEVEL_BYTES = 2**27
# Columns of block means per product: three tf32 products of more do not fit in the registers.
MEAN_TILE = 32


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


def supports(
    q: Tensor, *, block_q: int = 64, block_k: int = 64, scored: bool = False, **_: object
) -> str | None:
    """None if this file serves the call, else the reason why not; scored: q are scores."""
    return too_old(q) if scored else unsupported(q, block_q, block_k)


def block_table(
    q: Tensor,
    k: Tensor,
    keep: Keep,
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
    parts: int = 1,
) -> BlockTable | tuple[BlockTable, BlockMeans]:
    """See ops.block_table; equal scores go to the lower block."""
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    scale2, sizes = log2_scale(scale, q), (block_q, block_k, n_q, n_k)
    forced = _expand(forced, q, sizes)
    options = (forced, kv_len, max_forced, mass, near, max_near)
    rules = Rules(keep, *sizes, *options, scale2 if parts == 1 else None)
    spreads = spreads and return_means
    (q_mean, q_far, q_sub), (k_mean, k_far, k_sub) = query_key_means(
        q, k, block_q, block_k, kv_len, spreads, parts
    )
    table = _empty(q, rules, bits=return_means)
    rows = (q_mean, k_mean) if parts == 1 else (q_sub, k_sub)
    memory = _SCORE_BYTES if parts == 1 else _LEVEL_BYTES
    step = max(1, memory // (4 * parts * table.query_blocks * table.key_blocks))
    q_rows, k_rows, *out = (None if x is None else x.flatten(0, 1) for x in (*rows, *_parts(table)))
    for first in range(0, batch * heads, step):
        at = slice(first, first + step)
        if parts == 1:
            score = _scores(q_rows[at], k_rows[at])
        else:
            score = levels(q_rows[at], k_rows[at], rules, scale2, parts, first, heads)
        choose(score, *(None if x is None else x[at] for x in out), rules, first, heads, parts)
    if not return_means:
        return table
    return table, BlockMeans(q_mean, k_mean, q_far, k_far, kv_len)


def choose_blocks(
    scores: Tensor,
    keep: Keep,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    forced: Tensor | None = None,
    kv_len: int | Tensor | None = None,
    max_forced: int | None = None,
    mass: float = 0.0,
    near: Tensor | None = None,
    max_near: int = 0,
) -> BlockTable:
    """See ops.choose_blocks; equal scores go to the lower block."""
    sizes = (block_q, block_k, n_q, n_k)
    options = (_expand(forced, scores, sizes), kv_len, max_forced, mass, near, max_near)
    rules = Rules(keep, *sizes, *options)
    table = _empty(scores, rules, bits=True)
    flat = (x.flatten(0, 1) for x in (scores.float().contiguous(), *_parts(table)))
    choose(*flat, rules, 0, scores.shape[1])
    return table


def _expand(forced: Tensor | None, like: Tensor, sizes: tuple[int, ...]) -> Tensor | None:
    """[B, H, Mq, Mk], for the heads of [B, H, …]."""
    block_q, block_k, n_q, n_k = sizes
    blocks = block_count(n_q, block_q), block_count(n_k, block_k)
    return None if forced is None else forced.expand(*like.shape[:2], *blocks)


def _empty(like: Tensor, rules: Rules, bits: bool) -> BlockTable:
    """The table that `choose` fills, for the heads of [B, H, …]."""
    rows = (*like.shape[:2], block_count(rules.n_q, rules.block_q))
    indices = like.new_empty((*rows, rules.width), dtype=torch.int32)
    counts = like.new_empty(rows, dtype=torch.int32)
    words = None
    if bits:
        n_words = bit_words(block_count(rules.n_k, rules.block_k))
        words = BlockBits(counts.new_empty((*rows, n_words)), rules.kv_len)
    sizes = (rules.block_q, rules.block_k, rules.n_q, rules.n_k)
    return BlockTable(indices, counts, *sizes, bits=words)


def _parts(table: BlockTable) -> tuple[Tensor, Tensor, Tensor | None]:
    return table.indices, table.counts, None if table.bits is None else table.bits.words


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Products of means [n, Mq, D] and [n, Mk, D]: [n, Mq, m], m ≥ Mk."""
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
    return score
