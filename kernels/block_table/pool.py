"""What compensation reads besides the means of q and k, in one launch: pooled keys and values in
the dtype of the tokens, and the table as bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_table.means import column_tiles, mean_and_spread, tokens
from dit_accel.kernels.launch import capability_of, find, run
from dit_accel.table import BlockTable, block_count


class Pool(NamedTuple):
    """Means and bits of `pooled_blocks`.

    k, v: [B, H, M, D] in their dtype; bits [B, H, Mq, W] int32: bit m % 32 of word m // 32 is 1
    where the table keeps block m and beyond the last block with a valid key, unless that is told
    by a tensor; the words are those of whole 128 blocks. k_rest: what rounding took from k, in its
    dtype, and k_far its mean absolute deviations, if asked for.
    """

    k: Tensor
    v: Tensor
    bits: Tensor
    k_rest: Tensor | None
    k_far: Tensor | None


@triton.jit
def _store_bits(
    p_row, n_kept, p_bits, n_words, live, BLOCK: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    o_i = tl.arange(0, BLOCK)
    for i_w in range(0, n_words, WORDS):
        o_w = i_w + tl.arange(0, WORDS)
        b_w = tl.zeros([WORDS], tl.int32)
        for i in range(0, n_kept, BLOCK):
            b_i = tl.load(p_row + i + o_i, mask=i + o_i < n_kept, other=-1)
            b_bit = tl.full([BLOCK], 1, tl.int32) << (b_i & 31)
            # no block comes twice, so that a sum of bits is their union
            b_here = ((b_i >> 5)[:, None] == o_w[None, :]) & (b_i < live)[:, None]
            b_w += tl.sum(tl.where(b_here, b_bit[:, None], 0), 0)
        n_live = live - 32 * o_w
        b_beyond = tl.full([WORDS], -1, tl.int32) << tl.minimum(tl.maximum(n_live, 0), 31)
        b_w |= tl.where(n_live < 32, b_beyond, 0)
        tl.store(p_bits + o_w, b_w, mask=o_w < n_words)


@triton.jit(do_not_specialize=["n", "m", "m_known", "m_q", "width", "n_words", "live"])
def _block_pool_fwd_kernel(
    k, v, known, k_mean, k_rest, k_far, v_mean, indices, counts, bits, kv_len, s_k, s_v,
    n, m, m_known, m_q, width, n_words, live, d,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, AGAIN: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_m = tl.program_id(0) // PARTS
    if i_m < m:
        n_valid = n
        if kv_len is not None:
            n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n)
        o_d = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
        o_o = (i_bh * m + i_m) * d + o_d
        m_d = o_d < d
        if known is not None:
            o_k = i_m * d + o_d
            p_k = known + i_bh * m_known * d + o_k
            b_k = tl.load(p_k, mask=m_d & (o_k < m_known * d), other=0.0)
        else:
            b_k = mean_and_spread(
                k, k_far, s_k, i_b, i_h, i_m, n_valid, d, o_o, o_d, BLOCK, AGAIN
            )  # fmt: skip
        b_m = b_k.to(k_mean.dtype.element_ty)
        tl.store(k_mean + o_o, b_m, mask=m_d)
        if k_rest is not None:
            b_rest = b_k - b_m.to(tl.float32)
            tl.store(k_rest + o_o, b_rest.to(k_rest.dtype.element_ty), mask=m_d)
        b_v = mean_and_spread(v, None, s_v, i_b, i_h, i_m, n_valid, d, o_o, o_d, BLOCK, AGAIN)
        tl.store(v_mean + o_o, b_v.to(v_mean.dtype.element_ty), mask=m_d)
    else:
        i_row = i_bh * m_q + tl.program_id(0) - m * PARTS
        n_kept = tl.load(counts + i_row)
        p_row, p_bits = indices + i_row * width, bits + i_row * n_words
        _store_bits(p_row, n_kept, p_bits, n_words, live, 32, WORDS)


def pooled_blocks(
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    kv_len: int | Tensor | None = None,
    known: Tensor | None = None,
    rest: bool = False,
    spread: bool = False,
    multiple: int = 1,
) -> Pool:
    """The pool of a table's key blocks, their number rounded up to `multiple`.

    known: float32 [B, H, Mk, D], the means of k: then only v is read, and there are no deviations.
    """
    (batch, heads, n, d), m_q = k.shape, table.query_blocks
    m = -(-table.key_blocks // multiple) * multiple
    k_mean, v_mean = (x.new_empty((batch, heads, m, d)) for x in (k, v))
    lost = torch.empty_like(k_mean) if rest else None
    far = torch.empty_like(k_mean) if spread and known is None else None
    n_words = 4 * block_count(table.key_blocks, 128)
    bits = k.new_empty((batch, heads, m_q, n_words), dtype=torch.int32)
    launch, limits = find("pool", capability_of(k), d, table.block_k), tokens(n, kv_len)
    columns = column_tiles(d, launch)
    arguments = {
        "k": k, "v": v, "known": known, "k_mean": k_mean, "k_rest": lost, "k_far": far,
        "v_mean": v_mean, "indices": table.indices.contiguous(),
        "counts": table.counts.contiguous(), "bits": bits, **limits, "s_k": k.stride(),
        "s_v": v.stride(), "m": m, "m_known": table.key_blocks, "m_q": m_q,
        "width": table.indices.shape[-1], "n_words": n_words,
        "live": block_count(limits["n"], table.block_k), "d": d, "BLOCK": table.block_k,
        **columns, "WORDS": 64,
    }  # fmt: skip
    grid = (m * columns["PARTS"] + m_q, heads, batch)
    run(_block_pool_fwd_kernel, grid, arguments, launch)
    return Pool(k_mean, v_mean, bits, lost, far)
