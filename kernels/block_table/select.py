"""The best blocks of each row of scores, on CUDA in Triton: an exact top-k without a sort and
without a host sync.

A score that K of a row reach is found by bisection between the least and the largest, and so is the
one above which a mass p of the softmax lies (top-p, arXiv 2511.19835). The chosen blocks become
words of 32 bits, and the bits before a word its place, so that rows come out sorted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_table.pool import beyond
from dit_accel.kernels.launch import Launch, padded, run
from dit_accel.machine import cached_tensors
from dit_accel.table import Keep, block_count, kept_blocks, table_width


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


@triton.jit
def _share(p_level, m_pad, o_k, m_valid, n_left, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """The mean of softmax_m over a query block's parts, each by its tokens: of PARTS rows of
    `level`, in log2 units, the `n_left` tokens from the block's first on."""
    b_s = tl.zeros(o_k.shape, tl.float32)
    for i in range(PARTS):
        b_l = tl.load(p_level + i * m_pad + o_k, mask=m_valid, other=-float("inf"))
        top = tl.max(b_l)
        b_e = tl.exp2(b_l - tl.where(top == -float("inf"), 0.0, top))
        size = tl.clamp((n_left - i * SIZE).to(tl.float32), 0.0, SIZE)
        b_s += b_e * (size / tl.maximum(tl.sum(b_e), 1.0))
    return b_s / tl.clamp(n_left.to(tl.float32), 1.0, PARTS * SIZE)


_NUMBERS = ["i_first", "n_heads", "n_q", "n_k", "m_k", "n_want", "width", "n_words"]


@triton.jit(do_not_specialize=_NUMBERS)
def _block_select_fwd_kernel(
    score, forced, near, indices, counts, bits, kv_len, wants, s_f, s_n, s_w,
    i_first, n_heads, n_q, n_k, m_k, m_pad, n_want, width, n_words, mass, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_row = i_bh.to(tl.int64) * tl.num_programs(0) + i_n
    i_b, i_h = (i_bh + i_first) // n_heads, (i_bh + i_first) % n_heads
    n_live = tl.cdiv(n_k, BLOCK_K)  # with kv_len, of all samples
    if kv_len is not None:
        n_k = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    if wants is not None:
        n_want = tl.load(wants + i_b * s_w[0] + i_h * s_w[1])
    o_k = tl.arange(0, M)
    m_valid = o_k < tl.cdiv(n_k, BLOCK_K)
    if PARTS > 1:
        p_level = score + i_row * PARTS * m_pad
        n_left = n_q - i_n * BLOCK_Q
        b_s = _share(p_level, m_pad, o_k, m_valid, n_left, PARTS, BLOCK_Q // PARTS)
    else:
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
        if scale is not None:
            b_size = tl.clamp((n_k - o_k * BLOCK_K).to(tl.float32), 1.0, BLOCK_K)
            b_s = b_s * scale + tl.log2(b_size)
            top = tl.max(tl.where(m_valid, b_s, -float("inf")))
            b_a = tl.where(m_valid, tl.exp2(b_s - top), 0.0)
        else:  # shares already
            b_a = tl.where(m_valid, b_s, 0.0)
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


class Rules(NamedTuple):
    """What a row keeps besides its best blocks, and how many; see ops.block_table.

    forced: bool [B, H, Mq, Mk].
    scale: of a softmax over the scores, in log2 units; None where they
    are shares already.
    """

    keep: Keep
    block_q: int
    block_k: int
    n_q: int
    n_k: int
    forced: Tensor | None = None
    kv_len: int | Tensor | None = None
    max_forced: int | None = None
    mass: float = 0.0
    near: Tensor | None = None
    max_near: int = 0
    scale: float | None = None

    @property
    def limit(self) -> int:
        """Keys that may be valid."""
        return self.kv_len if isinstance(self.kv_len, int) else self.n_k

    @property
    def live(self) -> int:
        """Blocks that may hold a valid key."""
        return block_count(self.limit, self.block_k)

    @property
    def width(self) -> int:
        """Columns of the table."""
        forced = 0 if self.forced is None else self.max_forced
        return table_width(self.keep, self.live, forced, self.mass, self.max_near)

    def wants(self, heads: int, device: torch.device) -> Tensor | None:
        """kept_blocks of each sample and head, [B, H] int32, without a host sync; None if equal."""
        if not isinstance(self.kv_len, Tensor):
            return _wanted(self.keep, self.live, device) if _per_head(self.keep) else None
        keep = _shares(self.keep, device) if _per_head(self.keep) else self.keep
        blocks = (self.kv_len + self.block_k - 1) // self.block_k
        wanted = (keep * blocks.double()[:, None] - 1e-6).ceil().clamp(min=1).int()
        return wanted.expand(-1, heads)


def _per_head(keep: Keep) -> bool:
    return isinstance(keep, tuple)


@cached_tensors(1024)
def _wanted(keep: tuple[float, ...], blocks: int, device: torch.device) -> Tensor:
    """kept_blocks of each head, [1, H]; a copy to the device waits for it: once."""
    wanted = [kept_blocks(share, blocks) for share in keep]
    return torch.tensor([wanted], dtype=torch.int32, device=device)


@cached_tensors(1024)
def _shares(keep: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(keep, dtype=torch.float64, device=device)


def choose(
    score: Tensor,
    indices: Tensor,
    counts: Tensor,
    bits: Tensor | None,
    rules: Rules,
    first: int,
    heads: int,
    parts: int = 1,
) -> None:
    """Write the table of n heads, the first one number `first` of a batch with `heads` a sample.

    score: float32 [n, Mq · parts, m], m ≥ Mk; of more than one part the levels of sub.py.
    indices, counts, bits: [n, Mq, …].
    """
    forced, near, wants = rules.forced, rules.near, rules.wants(heads, counts.device)
    m_k, (n, m_q) = block_count(rules.n_k, rules.block_k), counts.shape
    width = max(128, padded(m_k))
    if wants is not None:
        wants = wants.expand(-1 if wants.shape[0] > 1 else (first + n - 1) // heads + 1, heads)
    arguments = {
        "score": score, "forced": None if forced is None else forced.view(torch.uint8),
        "near": None if near is None else near.view(torch.uint8), "indices": indices,
        "counts": counts, "bits": bits, "wants": wants,
        "kv_len": rules.kv_len if isinstance(rules.kv_len, Tensor) else None,
        "s_f": (0, 0, 0, 0) if forced is None else forced.stride(),
        "s_n": (0, 0) if near is None else near.stride(),
        "s_w": (0, 0) if wants is None else wants.stride(),
        "i_first": first, "n_heads": heads, "n_q": rules.n_q, "n_k": rules.limit, "m_k": m_k,
        "m_pad": score.shape[-1], "n_want": kept_blocks(rules.keep, rules.live),
        "width": indices.shape[-1], "n_words": 0 if bits is None else bits.shape[-1],
        "mass": rules.mass if rules.mass > 0 else None,
        "scale": rules.scale if rules.mass > 0 else None,
        "BLOCK_Q": rules.block_q, "BLOCK_K": rules.block_k, "PARTS": parts, "M": width,
    }  # fmt: skip
    run(_block_select_fwd_kernel, (m_q, n, 1), arguments, select_launch(width))


def select_launch(width: int) -> Launch:
    """One warp for each 1024 blocks of a row: with more a thread's share does not fit in its
    registers."""
    return Launch("select", 80, 128, 128, 16, min(16, max(1, width // 1024)), 1)
