"""What compensation reads besides the means of q and k: pooled keys and values in the dtype of the
tokens, and a table as bits, on CUDA in Triton."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_table.means import column_tiles, mean_and_spread, tokens
from dit_accel.kernels.launch import capability_of, find, run
from dit_accel.table import BlockTable, bit_words, block_count

_ROW = replace(find("rows", 80, 128, 128), warps=1)


class Pool(NamedTuple):
    """Means of k and v, [B, H, M, D] in their dtype; what rounding took from those of k, in it, and
    k's mean absolute deviations, if asked for."""

    k: Tensor
    v: Tensor
    k_rest: Tensor | None
    k_far: Tensor | None


@triton.jit(do_not_specialize=["n", "m_known"])
def _block_pool_fwd_kernel(
    k, v, known, k_mean, k_rest, k_far, v_mean, kv_len, s_k, s_v, n, m_known, d,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_m = tl.program_id(0) // SPLITS
    n_valid = n
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n)
    o_d = tl.program_id(0) % SPLITS * COLUMNS + tl.arange(0, COLUMNS)
    o_o = (i_bh * (tl.num_programs(0) // SPLITS) + i_m) * d + o_d
    m_d = o_d < d
    if known is not None:
        o_k = i_m * d + o_d
        p_k = known + i_bh * m_known * d + o_k
        b_k = tl.load(p_k, mask=m_d & (o_k < m_known * d), other=0.0)
    else:
        b_k = mean_and_spread(k, k_far, None, s_k, i_b, i_h, i_m, n_valid, d, o_o, o_d, BLOCK, 1)
    b_m = b_k.to(k_mean.dtype.element_ty)
    tl.store(k_mean + o_o, b_m, mask=m_d)
    if k_rest is not None:
        tl.store(k_rest + o_o, (b_k - b_m.to(tl.float32)).to(k_rest.dtype.element_ty), mask=m_d)
    b_v = mean_and_spread(v, None, None, s_v, i_b, i_h, i_m, n_valid, d, o_o, o_d, BLOCK, 1)
    tl.store(v_mean + o_o, b_v.to(v_mean.dtype.element_ty), mask=m_d)


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
        tl.store(bits + i_row * n_words + o_w, b_w | beyond(o_w, live), mask=o_w < n_words)


@triton.jit
def beyond(o_w, live):
    """Words `o_w` with the bits of blocks at or beyond `live` set."""
    n_live = live - 32 * o_w
    b_w = tl.full(o_w.shape, -1, tl.int32) << tl.minimum(tl.maximum(n_live, 0), 31)
    return tl.where(n_live < 32, b_w, 0)


def pooled_blocks(
    k: Tensor,
    v: Tensor,
    block: int,
    kv_len: int | Tensor | None = None,
    known: Tensor | None = None,
    rest: bool = False,
    spread: bool = False,
    multiple: int = 1,
) -> Pool:
    """The means of blocks, their number rounded up to `multiple`; `rest` and `spread` ask for the
    other two.

    known: float32 [B, H, Mk, D], the means of k: then only v is read, and there are no deviations.
    """
    batch, heads, n, d = k.shape
    m = -(-block_count(n, block) // multiple) * multiple
    k_mean, v_mean = (x.new_empty((batch, heads, m, d)) for x in (k, v))
    lost = torch.empty_like(k_mean) if rest else None
    far = torch.empty_like(k_mean) if spread and known is None else None
    launch = find("spreads" if far is not None else "means", capability_of(k), d, block)
    columns = column_tiles(d, launch)
    arguments = {
        "k": k, "v": v, "known": known, "k_mean": k_mean, "k_rest": lost, "k_far": far,
        "v_mean": v_mean, **tokens(n, kv_len), "s_k": k.stride(), "s_v": v.stride(),
        "m_known": block_count(n, block), "d": d, "BLOCK": block, **columns,
    }  # fmt: skip
    run(_block_pool_fwd_kernel, (m * columns["SPLITS"], heads, batch), arguments, launch)
    return Pool(k_mean, v_mean, lost, far)


def kept_bits(table: BlockTable, kv_len: int | Tensor | None = None) -> Tensor:
    """The words of `BlockBits` of a table: its own, which are of this kv_len, if it has them."""
    if table.bits is not None:
        return table.bits.words
    live = block_count(tokens(table.n_k, kv_len)["n"], table.block_k)
    n_words = bit_words(table.key_blocks)
    bits = table.indices.new_empty((*table.counts.shape, n_words), dtype=torch.int32)
    arguments = {
        "indices": table.indices.contiguous(), "counts": table.counts.contiguous(), "bits": bits,
        "width": table.indices.shape[-1], "n_words": n_words, "live": live, "BLOCK": 32,
        "WORDS": 64,
    }  # fmt: skip
    run(_kept_bits_fwd_kernel, (table.counts.numel(), 1, 1), arguments, _ROW)
    return bits
