"""Gradients of block-sparse attention on Hopper, in Gluon: persistent programs, warps with roles.

Two kernels of one shape. A row holds two blocks a and b, and the tiles x and y of 64 tokens of the
blocks of its list go by, so that with S = a·xᵀ and dP = b·yᵀ

    dq:      a, b = q, dO   x, y = k, v    dq += dS·x
    dk, dv:  a, b = k, v    x, y = q, dO   dk += dS·x   dv += P·y    (S, dP, P and dS transposed)

One warp copies by TMA, warpgroups of 64 rows of a and b multiply: two of a block of 128 (PARTS), or
one each of two blocks of 64 (LANES), which share nothing. What is beyond a tensor reads as zero and
adds nothing, as its weights stay finite: no tile is masked. If there is a sum for dq, the second
kernel also adds dSᵀ·k to it, in any order: its two warpgroups leave dS of a tile in shared memory,
and in the next tile each multiplies it, for half of the columns, so that the addition happens under
that tile's last products. At a row's first tile this is done, too, and nothing added.

Barriers, each with two phases, waited for in turn by the parity of its uses:
    held_full: completes its u-th phase when all rows of the u-th a and b have landed;
    held_empty: completes its u-th phase when every warpgroup needs the u-th a and b no more;
    full[s]: completes its u-th phase when x, y (and δ, LSE) of tile u·STAGES + s have landed;
    empty[s]: completes its u-th phase when every warpgroup has read tile u·STAGES + s;
    ds_full[t]: completes its u-th phase when dS of tile 2u + t is there from both warpgroups;
    ds_empty[t]: completes its u-th phase when both have multiplied dS of tile 2u + t (for t = 1, of
        tile 2u − 1);
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_accel.kernels.block_sparse_attention.gluon_backward_parts import (
    allocated,
    leave,
    operand,
    produce,
    products,
    start,
    tile,
    weights,
)
from dit_accel.kernels.block_sparse_attention.gluon_parts import place, told

# Adds four numbers of a thread to the place of the first.
_ADD = gl.constexpr("red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11};")


@gluon.jit
def _consume_dq(
    PART: gl.constexpr, d_dq, o_s, stats, memory, table, scale2, scale, SPLIT: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s, stats_s, row_s, held_full, held_empty, full, empty = memory
    indices, starts, counts, taken, width, m_rows, n_heads, n_rows, n_x, n_stats = table
    PARTS: gl.constexpr = q_s.shape[0]
    D: gl.constexpr = q_s.shape[2]
    STAGES: gl.constexpr = k_s.shape[0]
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA_S, 2)
    o_q = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA_S))
    g, phase = 0, 1
    mbarrier.wait(held_full, 0)
    i_row = told(row_s, 0)
    while i_row < n_rows:
        n_tiles = gl.maximum(gl.load(counts + i_row) * SPLIT, 1)
        p_stats = stats + (i_row * PARTS + PART).to(gl.int64) * 128 + o_q
        b_lse, b_delta = gl.load(p_stats), gl.load(p_stats + 64)
        b_q = q_s.index(PART).load(LEFT)
        b_do = do_s.index(PART).load(LEFT)
        fence_async_shared()
        mbarrier.arrive(held_empty, count=1)
        b_dq = gl.zeros([64, D], gl.float32, MMA_O)
        for _ in range(n_tiles):
            st = g % STAGES
            mbarrier.wait(full.index(st), g // STAGES & 1)
            s_token, p_token = products(b_q, k_s.index(st), b_do, v_s.index(st))
            b_s = warpgroup_mma_wait(1, (s_token,))
            b_p = weights(b_s, b_lse[:, None], scale2)
            b_dp = warpgroup_mma_wait(0, (p_token,))
            b_ds = operand(b_p * (b_dp - b_delta[:, None]), k_s.dtype, D)
            # [64, 64] @ [64, D] -> [64, D]
            q_token = warpgroup_mma(b_ds, k_s.index(st), b_dq, is_async=True)
            b_dq = warpgroup_mma_wait(0, (q_token,))
            mbarrier.arrive(empty.index(st), count=1)
            g += 1
        i_b, i_h, i_m = place(i_row, m_rows, n_heads)
        leave(d_dq, o_s.index(PART), b_dq * scale, i_b, i_h, (i_m * PARTS + PART) * 64)
        mbarrier.wait(held_full, phase)
        phase ^= 1
        i_row = told(row_s, 0)
    tma.store_wait(0)


@gluon.jit
def _dkdv_step(
    g, PART: gl.constexpr, b_dk, b_dv, memory, exchange, n_before, p_before, scale,
):  # fmt: skip
    """dk and dv of tile g; where dS is exchanged, dq of the tile before it, unless a row begins."""
    k_s, v_s, q_s, do_s, stats_s, row_s, held_full, held_empty, full, empty = memory
    ds_s, ds_full, ds_empty = exchange
    STAGES: gl.constexpr = q_s.shape[0]
    D: gl.constexpr = k_s.shape[2]
    dtype: gl.constexpr = k_s.dtype
    st = g % STAGES
    mbarrier.wait(full.index(st), g // STAGES & 1)
    s_token, p_token = products(k_s.index(PART), q_s.index(st), v_s.index(PART), do_s.index(st))
    COLUMN: gl.constexpr = gl.SliceLayout(0, s_token.type.tensor_type.layout)
    b_lse = stats_s.index(2 * st).load(COLUMN)
    b_s = warpgroup_mma_wait(1, (s_token,))
    b_w = weights(b_s, b_lse[None, :], scale)
    b_p = operand(b_w, dtype, D)
    b_delta = stats_s.index(2 * st + 1).load(COLUMN)
    # [64, 64] @ [64, D] -> [64, D]
    if ds_s is None:
        v_token = warpgroup_mma(b_p, do_s.index(st), b_dv, is_async=True)
        b_dp = warpgroup_mma_wait(1, (p_token,))
        b_ds = operand(b_w * (b_dp - b_delta[None, :]), dtype, D)
        k_token = warpgroup_mma(b_ds, q_s.index(st), b_dk, is_async=True)
    else:
        b_dp = warpgroup_mma_wait(0, (p_token,))
        b_w = (b_w * (b_dp - b_delta[None, :])).to(dtype)
        b_ds = operand(b_w, dtype, D)
        q_token = _begin_dq(g - 1, PART, k_s, exchange)
        v_token = warpgroup_mma(b_p, do_s.index(st), b_dv, is_async=True)
        k_token = warpgroup_mma(b_ds, q_s.index(st), b_dk, is_async=True)
        mbarrier.wait(ds_empty.index(g & 1), (g + 1) // 2 + 1 & 1)
        ds_s.index((g & 1) * 2 + PART).store(b_w)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(g & 1), count=1)
        b_dq = warpgroup_mma_wait(2, (q_token,))
        mbarrier.arrive(ds_empty.index((g & 1) ^ 1), count=1)
        _add_dq(PART, gl.where(n_before > 0, b_dq, 0.0), p_before)
    b_dv, b_dk = warpgroup_mma_wait(0, (v_token, k_token))
    mbarrier.arrive(empty.index(st), count=1)
    return b_dk, b_dv


@gluon.jit
def _begin_dq(g, PART: gl.constexpr, k_s, exchange):
    """dSᵀ·k of tile g, this warpgroup's half of the columns."""
    ds_s, ds_full, ds_empty = exchange
    HALF: gl.constexpr = k_s.shape[2] // 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    mbarrier.wait(ds_full.index(g & 1), g >> 1 & 1)
    b_dq = gl.zeros([64, HALF], gl.float32, MMA)
    for part in gl.static_range(2):
        # [64, 64] @ [64, D / 2] -> [64, D / 2]
        b_dq = warpgroup_mma(
            ds_s.index((g & 1) * 2 + part).permute((1, 0)),
            k_s.index(part).slice(PART * HALF, HALF, 1), b_dq, use_acc=part > 0, is_async=True,
        )  # fmt: skip
    return b_dq


@gluon.jit
def _add_dq(PART: gl.constexpr, b_dq, p_total):
    """Add a half of the columns to the sum of a tile."""
    HALF: gl.constexpr = b_dq.shape[1]
    o_q = gl.arange(0, 64, layout=gl.SliceLayout(1, b_dq.type.layout))
    o_d = gl.arange(0, HALF, layout=gl.SliceLayout(0, b_dq.type.layout))
    # four numbers of a thread, of rows o_q and o_q + 8 and columns o_d and o_d + 1, in one place
    b_q, b_d = o_q // 16 * (32 * HALF) + o_q % 8 * 16, o_d // 8 * 128 + o_d % 8 // 2 * 4
    b_at = b_q[:, None] + (b_d + PART * HALF * 16)[None, :]
    gl.inline_asm_elementwise(
        _ADD, "=r,=r,=r,=r,l,l,l,l,r,r,r,r", [(p_total + b_at).to(gl.int64), b_dq], dtype=gl.int32,
        is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _consume_dkdv(
    PART: gl.constexpr, d_dk, d_dv, o_s, total, pool, memory, exchange, table, n_valid, scale2,
    scale, BLOCK: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    k_s, v_s, q_s, do_s, stats_s, row_s, held_full, held_empty, full, empty = memory
    indices, starts, counts, taken, width, m_rows, n_heads, n_rows, n_x, n_stats = table
    PARTS: gl.constexpr = k_s.shape[0]
    D: gl.constexpr = k_s.shape[2]
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    o_k = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA_O))
    g, phase = 0, 1
    mbarrier.wait(held_full, 0)
    i_row = told(row_s, 0)
    while i_row < n_rows:
        n_tiles = gl.load(counts + i_row) * SPLIT
        p_idx = indices + start(starts, i_row, width)
        b_dk = gl.zeros([64, D], gl.float32, MMA_O)
        b_dv = gl.zeros([64, D], gl.float32, MMA_O)
        p_head, i_q = total, i_row * 0
        if total is not None:
            p_head = total + (i_row // m_rows).to(gl.int64) * n_stats * 64 * D
        for j in range(gl.maximum(n_tiles, 1)):
            p_before = None if total is None else p_head + i_q.to(gl.int64) * D
            b_dk, b_dv = _dkdv_step(g, PART, b_dk, b_dv, memory, exchange, j, p_before, scale2)
            if total is not None:
                i_q = tile(p_idx, j, n_tiles, 0, BLOCK, SPLIT)
            g += 1
        if total is not None:
            b_dq = warpgroup_mma_wait(0, (_begin_dq(g - 1, PART, k_s, exchange),))
            _add_dq(PART, b_dq, p_head + i_q.to(gl.int64) * D)
        mbarrier.arrive(held_empty, count=1)
        i_b, i_h, i_m = place(i_row, m_rows, n_heads)
        i_k = (i_m * PARTS + PART) * 64
        pool_dk, pool_dv, n_pool = pool
        if pool_dk is not None:
            # a mean hands each of its tokens an equal share of its gradient
            left = gl.minimum(gl.maximum(n_valid - i_m * PARTS * 64, 1), PARTS * 64)
            o_d = gl.arange(0, D, layout=gl.SliceLayout(0, MMA_O))
            o_p = (i_row // m_rows * n_pool + i_m).to(gl.int64) * D + o_d
            b_dk += (gl.load(pool_dk + o_p) / left.to(gl.float32))[None, :]
            b_dv += (gl.load(pool_dv + o_p) / left.to(gl.float32))[None, :]
        # a key beyond kv_len was read as zero, and its weights mean nothing
        valid = (i_k + o_k < n_valid)[:, None]
        b_dk = gl.where(valid, b_dk * scale, 0.0)
        b_dv = gl.where(valid, b_dv, 0.0)
        leave(d_dk, o_s.index(PART), b_dk, i_b, i_h, i_k)
        leave(d_dv, o_s.index(PART), b_dv, i_b, i_h, i_k)
        mbarrier.wait(held_full, phase)
        phase ^= 1
        i_row = told(row_s, 0)
    tma.store_wait(0)


@gluon.jit
def _exchange(dtype: gl.constexpr):
    """Places for dS of two warpgroups in two tiles, and their barriers."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ds_s = gl.allocate_shared_memory(dtype, [4, 64, 64], SHARED)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=2)
    return ds_s, ds_full, ds_empty


_SIZES = ["width", "m_rows", "n_heads", "n_rows", "n_x", "n_stats"]


@gluon.jit(do_not_specialize=_SIZES)
def _block_sparse_attention_hopper_bwd_dq_kernel(
    d_q, d_do, d_k, d_v, d_dq, stats, indices, counts, taken, width, m_rows, n_heads, n_rows, n_x,
    n_stats, scale2, scale, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = BLOCK_Q // 64
    SPLIT: gl.constexpr = BLOCK_K // 64
    table = (indices, None, counts, taken, width, m_rows, n_heads, n_rows, n_x, n_stats)
    m0, o0 = allocated(d_k.dtype, PARTS, D, STAGES, False)
    if PARTS == 2:
        fence_async_shared()
        gl.warp_specialize([
            (_consume_dq, (0, d_dq, o0, stats, m0, table, scale2, scale, SPLIT)),
            (_consume_dq, (1, d_dq, o0, stats, m0, table, scale2, scale, SPLIT)),
            (produce, (0, 1, d_q, d_do, d_k, d_v, None, m0, table, BLOCK_K, SPLIT)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        m1, o1 = allocated(d_k.dtype, PARTS, D, STAGES, False)
        fence_async_shared()
        gl.warp_specialize([
            (_consume_dq, (0, d_dq, o0, stats, m0, table, scale2, scale, SPLIT)),
            (_consume_dq, (0, d_dq, o1, stats, m1, table, scale2, scale, SPLIT)),
            (produce, (0, 2, d_q, d_do, d_k, d_v, None, m0, table, BLOCK_K, SPLIT)),
            (produce, (1, 2, d_q, d_do, d_k, d_v, None, m1, table, BLOCK_K, SPLIT)),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip


@gluon.jit(do_not_specialize=[*_SIZES, "n_valid", "n_pool"])
def _block_sparse_attention_hopper_bwd_dkdv_kernel(
    d_k, d_v, d_q, d_do, d_dk, d_dv, total, pool_dk, pool_dv, stats, indices, starts, counts,
    taken, width, m_rows, n_heads, n_rows, n_x, n_stats, n_valid, n_pool, scale2, scale,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = BLOCK_K // 64
    SPLIT: gl.constexpr = BLOCK_Q // 64
    table = (indices, starts, counts, taken, width, m_rows, n_heads, n_rows, n_x, n_stats)
    pool = (pool_dk, pool_dv, n_pool)
    dtype: gl.constexpr = d_k.dtype
    m0, o0 = allocated(dtype, PARTS, D, STAGES, True)
    e0 = (None, None, None)
    if PARTS == 2:
        if total is not None:
            e0 = _exchange(dtype)
        fence_async_shared()
        gl.warp_specialize([
            (_consume_dkdv, (0, d_dk, d_dv, o0, total, pool, m0, e0, table, n_valid, scale2,
                             scale, BLOCK_Q, SPLIT)),
            (_consume_dkdv, (1, d_dk, d_dv, o0, total, pool, m0, e0, table, n_valid, scale2,
                             scale, BLOCK_Q, SPLIT)),
            (produce, (0, 1, d_k, d_v, d_q, d_do, stats, m0, table, BLOCK_Q, SPLIT)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.static_assert(total is None)
        m1, o1 = allocated(dtype, PARTS, D, STAGES, True)
        fence_async_shared()
        gl.warp_specialize([
            (_consume_dkdv, (0, d_dk, d_dv, o0, total, pool, m0, e0, table, n_valid, scale2,
                             scale, BLOCK_Q, SPLIT)),
            (_consume_dkdv, (0, d_dk, d_dv, o1, total, pool, m1, e0, table, n_valid, scale2,
                             scale, BLOCK_Q, SPLIT)),
            (produce, (0, 2, d_k, d_v, d_q, d_do, stats, m0, table, BLOCK_Q, SPLIT)),
            (produce, (1, 2, d_k, d_v, d_q, d_do, stats, m1, table, BLOCK_Q, SPLIT)),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip
