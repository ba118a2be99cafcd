"""What Hopper's two gradient kernels share, in Gluon: the producer, and the pieces of a step."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)
from triton.language import PropagateNan

from dit_accel.kernels.block_sparse_attention.gluon_parts import (
    box,
    box_out,
    copy,
    number,
    place,
    take,
    tell,
)

_KEEP_NAN = gl.constexpr(PropagateNan.ALL)


@gluon.jit
def produce(
    LANE: gl.constexpr, LANES: gl.constexpr, d_a, d_b, d_x, d_y, stats, memory, table,
    BLOCK: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    a_s, b_s, x_s, y_s, stats_s, row_s, held_full, held_empty, full, empty = memory
    indices, starts, counts, taken, width, m_rows, n_heads, n_rows, n_x, n_stats = table
    PARTS: gl.constexpr = a_s.shape[0]
    D: gl.constexpr = a_s.shape[2]
    STAGES: gl.constexpr = x_s.shape[0]
    o_s = gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [1], [0]))
    i_row = gl.program_id(0) * LANES + LANE
    i_next, g, phase = i_row, 0, 0
    i_safe = gl.minimum(i_row, n_rows - 1)
    n_next, p_next = gl.load(counts + i_safe), start(starts, i_safe, width)
    while i_row < n_rows:
        b_taken = take(taken)
        n_tiles = n_next * SPLIT
        p_idx = indices + p_next
        i_b, i_h, i_m = place(i_row, m_rows, n_heads)
        mbarrier.wait(held_empty, phase ^ 1)
        phase ^= 1
        tell(row_s, 0, i_row)
        mbarrier.arrive(held_full, count=1)
        mbarrier.expect(held_full, PARTS * 64 * D * 4)
        for part in gl.static_range(PARTS):
            copy(d_a, i_b, i_h, (i_m * PARTS + part) * 64, held_full, a_s.index(part))
            copy(d_b, i_b, i_h, (i_m * PARTS + part) * 64, held_full, b_s.index(part))
        for j in range(gl.maximum(n_tiles, 1)):
            i_x = tile(p_idx, j, n_tiles, n_x, BLOCK, SPLIT)
            st = g % STAGES
            if stats is not None:
                # of a row without a block: weights of zero for a tile that is not there
                here = i_x < n_x
                i_t = i_row // m_rows * n_stats + gl.where(here, i_x // 64, 0)
                p_stats = stats + i_t.to(gl.int64) * 128
                b_lse = gl.where(here, gl.load(p_stats + o_s), float("inf"))
                b_delta = gl.load(p_stats + 64 + o_s)
            mbarrier.wait(empty.index(st), (g // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(st), 64 * D * 4)
            copy(d_x, i_b, i_h, i_x, full.index(st), x_s.index(st))
            copy(d_y, i_b, i_h, i_x, full.index(st), y_s.index(st))
            if stats is not None:
                stats_s.index(2 * st).store(b_lse)
                stats_s.index(2 * st + 1).store(b_delta)
                mbarrier.arrive(full.index(st), count=1)
            g += 1
            if j == n_tiles // 2:
                # of the next row all is known when this one ends
                i_next = gl.num_programs(0) * LANES + number(b_taken)
                i_safe = gl.minimum(i_next, n_rows - 1)
                n_next, p_next = gl.load(counts + i_safe), start(starts, i_safe, width)
        i_row = i_next
    mbarrier.wait(held_empty, phase ^ 1)
    tell(row_s, 0, n_rows)
    mbarrier.arrive(held_full, count=2)


@gluon.jit
def start(starts, i_row, width):
    """Where the list of a row begins."""
    if starts is None:
        return i_row.to(gl.int64) * width
    else:
        return gl.load(starts + i_row)


@gluon.jit
def tile(p_idx, j, n_tiles, n_x, BLOCK: gl.constexpr, SPLIT: gl.constexpr):
    """Where tile j of a row begins; beyond all tokens where there is none."""
    here = j < n_tiles
    j = gl.where(here, j, 0)
    i_x = gl.load(p_idx + j // SPLIT, mask=here, other=0) * BLOCK + j % SPLIT * 64
    return gl.where(here, i_x, n_x)


@gluon.jit
def products(b_a, x_s, b_b, y_s):
    """a·xᵀ and b·yᵀ of a tile, begun."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    # [64, D] @ [D, 64] -> [64, 64]
    b_zero = gl.zeros([64, 64], gl.float32, MMA)
    a_token = warpgroup_mma(b_a, x_s.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_token = warpgroup_mma(b_b, y_s.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    return a_token, b_token


@gluon.jit
def weights(b_s, b_lse, scale):
    """P: at most 1, so that the limit of 2 changes none; it keeps tokens that are zero finite."""
    return gl.exp2(gl.minimum(b_s * scale - b_lse, 1.0, propagate_nan=_KEEP_NAN))


@gluon.jit
def operand(b_x, dtype: gl.constexpr, D: gl.constexpr):
    """Rows of float32 as the left side of a product of D columns."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    return gl.convert_layout(b_x.to(dtype), gl.DotOperandLayout(0, MMA, 2))


@gluon.jit
def leave(d_o, o_s, b_o, i_b, i_h, i_n):
    """Store 64 rows."""
    # the store before this one may still read the memory
    tma.store_wait(0)
    o_s.store(b_o.to(o_s.dtype))
    fence_async_shared()
    box_out(d_o, [i_b, i_h, i_n, 0], box(o_s, d_o))


@gluon.jit
def allocated(
    dtype: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    STATS: gl.constexpr,
):  # fmt: skip
    """Shared memory and barriers of a producer and its warpgroups, and memory for what leaves."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_s = gl.allocate_shared_memory(dtype, [PARTS, 64, D], SHARED)
    b_s = gl.allocate_shared_memory(dtype, [PARTS, 64, D], SHARED)
    x_s = gl.allocate_shared_memory(dtype, [STAGES, 64, D], SHARED)
    y_s = gl.allocate_shared_memory(dtype, [STAGES, 64, D], SHARED)
    o_s = gl.allocate_shared_memory(dtype, [PARTS, 64, D], SHARED)
    stats_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 64], VECTOR)
    row_s = gl.allocate_shared_memory(gl.int32, [1, 32], VECTOR)
    held_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    held_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(held_full, count=2)
    mbarrier.init(held_empty, count=PARTS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2 if STATS else 1)
        mbarrier.init(empty.index(i), count=PARTS)
    return (a_s, b_s, x_s, y_s, stats_s, row_s, held_full, held_empty, full, empty), o_s
