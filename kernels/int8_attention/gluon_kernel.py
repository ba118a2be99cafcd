"""Block-sparse attention in eight bits on Hopper, in Gluon: persistent programs whose warps have
roles.

The protocol is that of block_sparse_attention/gluon_kernel.py: slot g of the ring holds K of tile g
and V of tile g − 1, and a row's tiles go from its end to its start. Here a tile is two groups of 64
keys, of one block or of two, so that a barrier and a rescaling serve 128 keys at any block size. A
group has a scale for its keys and an exponent for its values: the producer writes both into the
slot by ordinary stores, and arrives at its "full" once more after them.

    full[s]: completes its u-th phase when K, V and the four numbers of slot u·STAGES + s are there.

A step is q·kᵀ of the next tile, which follows p·v of this one, then the softmax beside nothing of
its own warpgroup: the other one's products fill the tensor cores meanwhile. Weights in e4m3 that
waited for the next step, as in 16 bits, would be taken apart into bytes and put together again.

q is rounded to int8 by each warpgroup, in registers. The sums of p·v stay in the tensor cores'
accumulator, which adds e4m3 products to 13 bits: gluon.py says up to how many keys that serves.
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

from dit_accel.kernels.block_sparse_attention.gluon_parts import (
    box,
    box_in,
    copy,
    finish,
    group,
    place,
    tiles,
)

_SCALARS = gl.constexpr(4)  # of a slot: scale and exponent of each of its two groups


@gluon.jit
def _put(scalars, i, x):
    """Write a number into shared memory."""
    scalars.index(i).store(gl.full([1], x, gl.float32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _get(scalars, i):
    """Read a number from shared memory."""
    return gl.sum(scalars.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _produce(d_q, d_k, d_v, p_scale, p_exponent, memory, table, BLOCK_K: gl.constexpr):
    q_s, q_full, q_empty, ring = memory
    k_s, v_s, scalars, full, empty = ring
    indices, counts, width, n_q, n_valid, m_q, n_heads, n_rows, n_groups = table
    PARTS: gl.constexpr = q_s.shape[0]
    STAGES: gl.constexpr = k_s.shape[0] // 2
    D: gl.constexpr = k_s.shape[2]
    SPLIT: gl.constexpr = BLOCK_K // 64
    first, step = gl.program_id(0), gl.num_programs(0)
    g, phase = 0, 0
    n_keys = n_groups * 64  # of a head, rounded up: whatever begins there reads as zero
    v_b, v_h, v_0, v_1 = 0, 0, n_keys, n_keys
    n_next = gl.load(counts + first)
    # one step more than rows: see _consume
    for i_step in range(first, n_rows + step, step):
        live = i_step < n_rows
        i_row = gl.minimum(i_step, n_rows - 1)
        n_kept = gl.where(live, n_next, 0)
        n_next = gl.load(counts + gl.minimum(i_row + step, n_rows - 1))
        p_idx = indices + i_row.to(gl.int64) * width
        n_left = n_valid - gl.load(p_idx + gl.maximum(n_kept - 1, 0)) * BLOCK_K
        n_tiles, n_here, _ = tiles(n_left, n_kept, 64, SPLIT, 2)
        i_b, i_h, i_m = place(i_row, m_q, n_heads)
        i_head = (i_row // m_q).to(gl.int64) * n_groups
        mbarrier.wait(q_empty, phase ^ 1)
        phase ^= 1
        mbarrier.expect(q_full, PARTS * 64 * D * 2)
        for part in gl.static_range(PARTS):
            i_q = gl.where(live, (i_m * PARTS + part) * 64, n_q)
            copy(d_q, i_b, i_h, i_q, q_full, q_s.index(part))
        for i in range(n_tiles):
            j = 2 * (n_tiles - 1 - i)
            i_0 = group(p_idx, j, n_here, n_keys, BLOCK_K, 64)
            i_1 = group(p_idx, j + 1, n_here, n_keys, BLOCK_K, 64)
            at_0 = i_head + gl.minimum(i_0 // 64, n_groups - 1)
            at_1 = gl.where(j + 1 < n_here, i_head + i_1 // 64, at_0)
            w_0, w_1 = gl.load(p_scale + at_0), gl.load(p_scale + at_1)
            e_0, e_1 = gl.load(p_exponent + at_0), gl.load(p_exponent + at_1)
            st = g % STAGES
            bar = full.index(st)
            mbarrier.wait(empty.index(st), (g // STAGES & 1) ^ 1)
            mbarrier.expect(bar, 4 * 64 * D)
            copy(d_k, i_b, i_h, i_0, bar, k_s.index(2 * st))
            copy(d_k, i_b, i_h, i_1, bar, k_s.index(2 * st + 1))
            _copy_values(d_v, v_b, v_h, v_0, bar, v_s.index(2 * st))
            _copy_values(d_v, v_b, v_h, v_1, bar, v_s.index(2 * st + 1))
            _put(scalars, st * _SCALARS, w_0)
            _put(scalars, st * _SCALARS + 1, e_0)
            _put(scalars, st * _SCALARS + 2, w_1)
            _put(scalars, st * _SCALARS + 3, e_1)
            mbarrier.arrive(bar, count=1)
            v_b, v_h, v_0, v_1 = i_b, i_h, i_0, i_1
            g += 1


@gluon.jit
def _copy_values(desc, i_b, i_h, i_n, bar, x_s):
    """Start the copy of 64 columns at i_n of a head, its values with keys last."""
    box_in(desc, [i_b, i_h, 0, i_n], bar, box(x_s, desc))


@gluon.jit
def _above(b_m):
    """m, rounded up: no weight exceeds 448, though s·c is subtracted from m without rounding."""
    return b_m + gl.abs(b_m) * 1.1920928955078125e-07


@gluon.jit
def _multiply(g, b_q, b_a, b_p0, b_p1, b_o, ring):
    """q·kᵀ of both groups of tile g, and p·v of the tile before added to o. Slot g has landed.

    Returns q·kᵀ as float32, the factors of its rows that make it log2 units, the exponents of both
    groups' values, and o.
    """
    k_s, v_s, scalars, full, empty = ring
    STAGES: gl.constexpr = k_s.shape[0] // 2
    LAYOUT: gl.constexpr = b_q.type.layout.parent
    st = g % STAGES
    b_s = gl.zeros([64, 64], gl.int32, LAYOUT)
    # [64, D] @ [D, 64] -> [64, 64]
    k_0, k_1 = k_s.index(2 * st).permute((1, 0)), k_s.index(2 * st + 1).permute((1, 0))
    b_s0 = warpgroup_mma(b_q, k_0, b_s, use_acc=False, is_async=True)
    b_s1 = warpgroup_mma(b_q, k_1, b_s, use_acc=False, is_async=True)
    # [64, 64] @ [64, D] -> [64, D]
    v_0, v_1 = v_s.index(2 * st).permute((1, 0)), v_s.index(2 * st + 1).permute((1, 0))
    b_o = warpgroup_mma(b_p0, v_0, b_o, is_async=True)
    b_o = warpgroup_mma(b_p1, v_1, b_o, is_async=True)
    b_c0, e_0 = _get(scalars, st * _SCALARS) * b_a, _get(scalars, st * _SCALARS + 1)
    b_c1, e_1 = _get(scalars, st * _SCALARS + 2) * b_a, _get(scalars, st * _SCALARS + 3)
    b_s0, b_s1, b_o = warpgroup_mma_wait(0, (b_s0, b_s1, b_o))
    mbarrier.arrive(empty.index(st), count=1)
    # a step of 8 tells any two integers apart, and keeps maxima below 2^24
    b_c0, b_c1 = gl.minimum(b_c0, 8.0), gl.minimum(b_c1, 8.0)
    return b_s0.to(gl.float32), b_s1.to(gl.float32), b_c0, b_c1, e_0, e_1, b_o


@gluon.jit
def _weights(b_s, b_c, b_ref, P: gl.constexpr):
    """2^(s·c − ref) of a group in e4m3 as an operand, in the order of quantize.shuffled, and their
    sum."""
    b_w = gl.exp2(gl.fma(b_s, b_c[:, None], -b_ref[:, None]))
    b_sum = gl.sum(b_w, 1)
    b_w = b_w.reshape([64, 4, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, 64])
    return gl.convert_layout(b_w.to(gl.float8e4nv), P), b_sum


@gluon.jit
def _softmax(b_s0, b_s1, b_c0, b_c1, e_0, e_1, b_m, b_l, e_o, P: gl.constexpr):
    """One step of the online softmax over the two groups of a tile.

    A weight is 448·2^(s·c − m + e − e_n), where 2^e is the scale of its group's values and e_n the
    largest e so far: e4m3 ends at 448. Returns p of both groups, the factor of o, m, l, and e_n: o
    is in units of 2^e_n.
    """
    b_new = gl.maximum(b_m, gl.maximum(gl.max(b_s0, 1) * b_c0, gl.max(b_s1, 1) * b_c1))
    e_n = gl.maximum(e_o, gl.maximum(e_0, e_1))
    b_ref = _above(b_new)
    b_r = gl.exp2(_above(b_m) - b_ref)
    b_ref -= 8.807354922057604
    b_p0, b_sum0 = _weights(b_s0, b_c0, b_ref - (e_0 - e_n), P)
    b_p1, b_sum1 = _weights(b_s1, b_c1, b_ref - (e_1 - e_n), P)
    b_l = b_l * b_r + b_sum0 * gl.exp2(e_n - e_0) + b_sum1 * gl.exp2(e_n - e_1)
    return b_p0, b_p1, b_r * gl.exp2(e_o - e_n), b_new, b_l, e_n


@gluon.jit
def _rounded(b_x, ROW: gl.constexpr):
    """Rows in int8 and their scales: the nearest integers, ties to even, as adding 1.5·2²³ leaves
    no fraction bits."""
    b_a = gl.maximum(gl.max(gl.abs(b_x), 1), 1e-12) / 127
    b_x = (b_x * (1.0 / b_a)[:, None] + 12582912.0) - 12582912.0
    return b_x.to(gl.int8), gl.convert_layout(b_a, ROW)


@gluon.jit
def _consume(
    PART: gl.constexpr, d_o, o_s, lse, mean, memory, table, scale, BLOCK_K: gl.constexpr
):  # fmt: skip
    q_s, q_full, q_empty, ring = memory
    k_s, v_s, scalars, full, empty = ring
    indices, counts, width, n_q, n_valid, m_q, n_heads, n_rows, n_groups = table
    PARTS: gl.constexpr = q_s.shape[0]
    STAGES: gl.constexpr = k_s.shape[0] // 2
    D: gl.constexpr = k_s.shape[2]
    SPLIT: gl.constexpr = BLOCK_K // 64
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    Q: gl.constexpr = gl.DotOperandLayout(0, MMA_S, 4)
    P: gl.constexpr = gl.DotOperandLayout(0, MMA_O, 4)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA_S)
    ROW_O: gl.constexpr = gl.SliceLayout(1, MMA_O)
    o_k = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA_S))
    b_p0 = gl.zeros([64, 64], gl.float8e4nv, P)
    b_p1 = b_p0
    b_o = gl.zeros([64, D], gl.float32, MMA_O)
    b_m = gl.full([64], -1e30, gl.float32, ROW)
    b_l = gl.zeros([64], gl.float32, ROW)
    b_shift = gl.zeros([64], gl.float32, ROW)
    e_o = -1000.0
    first, step = gl.program_id(0), gl.num_programs(0)
    g, phase = 0, 0
    n_kept = gl.load(counts + first)
    p_last = indices + first.to(gl.int64) * width + gl.maximum(n_kept - 1, 0)
    n_left = n_valid - gl.load(p_last) * BLOCK_K
    # a step starts its row and finishes the one before, so that there is one step more than rows
    for i_row in range(first, n_rows + step, step):
        n_kept = gl.where(i_row < n_rows, n_kept, 0)
        n_tiles, _, n_first = tiles(n_left, n_kept, 64, SPLIT, 2)
        mbarrier.wait(q_full, phase)
        phase ^= 1
        b_x = q_s.index(PART).load(Q).to(gl.float32) * scale
        fence_async_shared()
        mbarrier.arrive(q_empty, count=1)
        b_shift1 = b_shift
        if lse is not None:
            o_d = gl.arange(0, D, layout=gl.SliceLayout(0, Q))
            p_mean = mean + gl.minimum(i_row, n_rows - 1) // m_q * D + o_d
            b_shift1 = gl.convert_layout(gl.sum(b_x * gl.load(p_mean)[None, :], 1), ROW)
        b_q, b_a = _rounded(b_x, ROW)
        mbarrier.wait(full.index(g % STAGES), g // STAGES & 1)
        b_s0, b_s1, b_c0, b_c1, e_0, e_1, b_o = _multiply(g, b_q, b_a, b_p0, b_p1, b_o, ring)
        g += 1
        b_s0 = gl.where(o_k[None, :] < n_first, b_s0, -float("inf"))
        b_s1 = gl.where(o_k[None, :] + 64 < n_first, b_s1, -float("inf"))
        if i_row >= step:
            i_done = i_row - step
            i_q = (i_done % m_q * PARTS + PART) * 64
            # o in units of 1 by a sum in units of 2^-e; LSE takes both back, and gets scale·q·k̄
            b_top = _above(b_m) - 8.807354922057604 + e_o + b_shift
            b_top = gl.where(b_l > 0, b_top, -float("inf"))
            finish(
                d_o, o_s.index(PART), None, lse, None, None, None, b_o, b_top, b_l * gl.exp2(-e_o),
                i_done, i_q, n_q, m_q, n_heads, D,
            )  # fmt: skip
        b_o = gl.zeros([64, D], gl.float32, MMA_O)
        b_m = gl.full([64], -1e30, gl.float32, ROW)
        b_l = gl.zeros([64], gl.float32, ROW)
        e_o = -1000.0
        b_shift = b_shift1
        # read early what the next step needs: the tiles of this row hide the latency
        i_next = gl.minimum(i_row + step, n_rows - 1)
        n_kept = gl.load(counts + i_next)
        for _ in range(1, n_tiles):
            b_p0, b_p1, b_r, b_m, b_l, e_o = _softmax(
                b_s0, b_s1, b_c0, b_c1, e_0, e_1, b_m, b_l, e_o, P
            )
            mbarrier.wait(full.index(g % STAGES), g // STAGES & 1)
            b_o = b_o * gl.convert_layout(b_r, ROW_O)[:, None]
            b_s0, b_s1, b_c0, b_c1, e_0, e_1, b_o = _multiply(g, b_q, b_a, b_p0, b_p1, b_o, ring)
            g += 1
        b_p0, b_p1, b_r, b_m, b_l, e_o = _softmax(
            b_s0, b_s1, b_c0, b_c1, e_0, e_1, b_m, b_l, e_o, P
        )
        b_o = b_o * gl.convert_layout(b_r, ROW_O)[:, None]
        p_last = indices + i_next.to(gl.int64) * width + gl.maximum(n_kept - 1, 0)
        n_left = n_valid - gl.load(p_last) * BLOCK_K
    tma.store_wait(0)


_SIZES = ["n_q", "n_valid", "width", "m_q", "n_heads", "n_rows", "n_groups"]


@gluon.jit(do_not_specialize=_SIZES)
def _int8_attention_hopper_fwd_kernel(
    d_q, d_k, d_v, d_o, k_scale, v_exponent, mean, lse, indices, counts,
    n_q, n_valid, width, m_q, n_heads, n_rows, n_groups, scale,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES > 1)
    gl.static_assert(BLOCK_Q == 128)
    dtype: gl.constexpr = d_q.dtype
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    KEYS: gl.constexpr = gl.NVMMASharedLayout(D, 8, rank=2)
    VALUES: gl.constexpr = gl.NVMMASharedLayout(64, 8, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], WIDE)
    o_s = gl.allocate_shared_memory(dtype, [2, 64, D], WIDE)
    k_s = gl.allocate_shared_memory(d_k.dtype, [2 * STAGES, 64, D], KEYS)
    v_s = gl.allocate_shared_memory(d_v.dtype, [2 * STAGES, D, 64], VALUES)
    scalars = gl.allocate_shared_memory(gl.float32, [_SCALARS * STAGES, 1], NUMBER)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    memory = (q_s, q_full, q_empty, (k_s, v_s, scalars, full, empty))
    table = (indices, counts, width, n_q, n_valid, m_q, n_heads, n_rows, n_groups)
    gl.warp_specialize([
        (_consume, (0, d_o, o_s, lse, mean, memory, table, scale, BLOCK_K)),
        (_consume, (1, d_o, o_s, lse, mean, memory, table, scale, BLOCK_K)),
        (_produce, (d_q, d_k, d_v, k_scale, v_exponent, memory, table, BLOCK_K)),
    ], [4, 1], [240, 24])  # fmt: skip
