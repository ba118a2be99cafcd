"""Scores of blocks in parts, on CUDA in Triton.

    level_{a,m} = log2 Σ_b |b| 2^{scale·q̄_a·k̄_b}        b over the parts of key block m
    score_nm = mean over the parts a of query block n of softmax_m(level_{a,m})

Of one part and equal blocks these are ordered as q̄·k̄, of single tokens they are the blocks' exact
shares of attention. Levels are written once, for the choice to read: a second pass of products
would cost more. Their means are in the dtype of the tokens: a rounding of 2⁻⁹ of a logit moves no
block that matters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_table.means import load_means
from dit_accel.kernels.block_table.select import Rules
from dit_accel.kernels.launch import Launch, capability_of, find, padded, run
from dit_accel.table import block_count

# Programs that fill the GPU: the keys of a head are split so that about this many run.
_PROGRAMS = 264


@triton.jit(do_not_specialize=["n_k", "i_first", "n_heads", "m_q", "m_k", "span"])
def _block_levels_fwd_kernel(
    q, k, level, kv_len, n_k, i_first, n_heads, m_q, m_k, m_pad, d, span, scale,
    SIZE: tl.constexpr, PARTS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(2).to(tl.int64)
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + (i_bh + i_first) // n_heads).to(tl.int32), n_k)
    o_q = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    o_k, o_d = tl.arange(0, TILE_K), tl.arange(0, D)
    o_m = tl.arange(0, TILE_K // PARTS)
    first = tl.program_id(0) * span
    b_q = load_means(q + i_bh * m_q * d, o_q, o_d, m_q, d)
    p_level = level + (i_bh * m_q + o_q[:, None]) * m_pad + o_m[None, :]
    for i in tl.range(first, tl.minimum(first + span, m_k), TILE_K, num_stages=STAGES):
        b_k = load_means(k + i_bh * m_k * d, i + o_k, o_d, m_k, d)
        # [TQ, D] @ [D, TK] -> [TQ, TK]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_size = (n_valid - (i + o_k) * SIZE).to(tl.float32)
        b_bias = tl.log2(tl.clamp(b_size / SIZE, 1.0 / SIZE, 1.0))
        b_s += tl.where(b_size > 0, b_bias, -float("inf"))[None, :]
        b_s = tl.reshape(b_s, [TILE_Q, TILE_K // PARTS, PARTS])
        b_m = tl.max(b_s, 2)
        b_ref = tl.where(b_m == -float("inf"), 0.0, b_m)
        b_l = tl.log2(tl.sum(tl.exp2(b_s - b_ref[:, :, None]), 2)) + b_ref
        m_l = (o_q[:, None] < m_q) & (i // PARTS + o_m[None, :] < m_pad)
        tl.store(p_level + i // PARTS, b_l, mask=m_l)


def levels(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    scale: float,
    parts: int,
    first: int,
    heads: int,
    launch: Launch | None = None,
) -> Tensor:
    """Levels [n, Mq · parts, m] float32, m ≥ Mk, of means [n, Mq · parts, D] and
    [n, Mk · parts, D] of n heads, the first one number `first` of a batch with `heads` a sample.

    scale: of the softmax, in log2 units.
    """
    (n, m_q, d), m_k = q.shape, k.shape[1]
    launch = launch or find("levels", capability_of(q), d, rules.block_q)
    tile_q, tile_k = launch.block, max(launch.tile, parts)
    m_pad = -(-m_k // parts // 16) * 16
    level = q.new_empty((n, m_q, m_pad), dtype=torch.float32)
    rows, tiles = block_count(m_q, tile_q), block_count(m_k, tile_k)
    splits = min(tiles, block_count(_PROGRAMS, rows * n))
    span = block_count(tiles, splits) * tile_k
    arguments = {
        "q": q, "k": k, "level": level,
        "kv_len": rules.kv_len if isinstance(rules.kv_len, Tensor) else None, "n_k": rules.limit,
        "i_first": first, "n_heads": heads, "m_q": m_q, "m_k": m_k, "m_pad": m_pad, "d": d,
        "span": span, "scale": scale, "SIZE": rules.block_k // parts, "PARTS": parts,
        "TILE_Q": tile_q, "TILE_K": tile_k, "D": padded(d), "STAGES": launch.stages,
        "PRECISION": launch.precision,
    }  # fmt: skip
    run(_block_levels_fwd_kernel, (block_count(m_k, span), rows, n), arguments, launch)
    return level
