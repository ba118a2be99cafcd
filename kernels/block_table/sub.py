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

# The logit of a part without a token: of no weight beside any other, and no difference is not a
# number.
_NONE = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["n_k", "i_first", "n_heads", "m_q", "m_k"])
def _block_levels_fwd_kernel(
    q, k, level, kv_len, n_k, i_first, n_heads, m_q, m_k, m_pad, d, scale,
    SIZE: tl.constexpr, PARTS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(2).to(tl.int64)
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + (i_bh + i_first) // n_heads).to(tl.int32), n_k)
    o_q = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    o_m, o_d = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K), tl.arange(0, D)
    b_q = load_means(q + i_bh * m_q * d, o_q, o_d, m_q, d)
    b_m = tl.full([TILE_Q, TILE_K], _NONE, tl.float32)
    b_l = tl.zeros([TILE_Q, TILE_K], tl.float32)
    # a step has one part of every block, so that a thread sums over parts alone
    for i in tl.range(0, PARTS, num_stages=STAGES):
        o_k = o_m * PARTS + i
        b_k = load_means(k + i_bh * m_k * d, o_k, o_d, m_k, d)
        b_size = (n_valid - o_k * SIZE).to(tl.float32)
        b_bias = tl.log2(tl.clamp(b_size / SIZE, 1.0 / SIZE, 1.0))
        b_bias = tl.where(b_size > 0, b_bias, _NONE)
        # [TQ, D] @ [D, TK] -> [TQ, TK]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + b_bias[None, :]
        # of the two terms the larger is one: a single power for both
        b_e = tl.exp2(-tl.abs(b_s - b_m))
        b_l = tl.where(b_s > b_m, b_l * b_e + 1.0, b_l + b_e)
        b_m = tl.maximum(b_s, b_m)
    m_l = (o_q[:, None] < m_q) & (o_m[None, :] < m_pad)
    p_level = level + (i_bh * m_q + o_q[:, None]) * m_pad + o_m[None, :]
    tl.store(p_level, b_m + tl.log2(b_l), mask=m_l)


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
    tile_q, tile_k = launch.block, launch.tile
    m_pad = -(-m_k // parts // 16) * 16
    level = q.new_empty((n, m_q, m_pad), dtype=torch.float32)
    arguments = {
        "q": q, "k": k, "level": level,
        "kv_len": rules.kv_len if isinstance(rules.kv_len, Tensor) else None, "n_k": rules.limit,
        "i_first": first, "n_heads": heads, "m_q": m_q, "m_k": m_k, "m_pad": m_pad, "d": d,
        "scale": scale, "SIZE": rules.block_k // parts, "PARTS": parts,
        "TILE_Q": tile_q, "TILE_K": tile_k, "D": padded(d), "STAGES": launch.stages,
        "PRECISION": launch.precision,
    }  # fmt: skip
    grid = (block_count(m_k // parts, tile_k), block_count(m_q, tile_q), n)
    run(_block_levels_fwd_kernel, grid, arguments, launch)
    return level
