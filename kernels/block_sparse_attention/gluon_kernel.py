"""Block-sparse attention on Hopper, in Gluon: persistent programs whose warps have roles.

One warp copies by TMA, and two warpgroups of 64 query rows each multiply; for query blocks of 64,
one row in each of two lanes, which have a warp that copies, and memory, of their own. The rows of a
lane are one stream of tiles: slot g of the ring of STAGES slots holds K of tile g and V of tile
g − 1, so that q·kᵀ of a tile runs beside p·v of the one before, and the first tile of a row beside
the last of the row before. A tile is one or two groups of ROWS keys, two perhaps of different
blocks: only the producer sees them apart. A row's tiles go from its end to its start: the only tile
with a masked token comes first. Coordinates beyond a tensor read as zeros, and serve where there is
no tile or group: V before the first, K after the last, a row without a block.

Of p lanes each has every p-th row of the table, or after its first one the next of a counter. The
producer asks for that number as a row begins and reads the next row's count in its middle, so that
both come while it copies.

Barriers, each with two phases, waited for in turn by the parity of its uses:
    q_full: completes its u-th phase when all rows of the u-th q have landed (and it is told which
        row of the table they are, where rows are taken from a counter);
    q_empty: completes its u-th phase when every warpgroup holds the u-th q in registers;
    full[s]: completes its u-th phase when K and V of slot u·STAGES + s have landed;
    empty[s]: completes its u-th phase when every warpgroup has read slot u·STAGES + s.
The producer fills a place only after its previous phase of "empty", and a warpgroup reads it only
after its phase of "full": no barrier runs two phases ahead of who waits for it. The producer issues
in the order in which warpgroups wait. A warpgroup waits for slot g + 1 before it gives slot g back,
so that STAGES is at least two; then every place that it waits for is free once the other has done
what nothing keeps it from: there is no cycle of waits.
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

from dit_accel.kernels.block_sparse_attention.gluon_additions import linear_end, pooled_logits
from dit_accel.kernels.block_sparse_attention.gluon_parts import (
    copy,
    copy_tile,
    finish,
    group,
    number,
    place,
    take,
    tell,
    tiles,
    told,
    whole,
    words,
)


@gluon.jit
def _produce(
    LANE: gl.constexpr, LANES: gl.constexpr, d_q, d_k, d_v, d_pk, d_pv, memory, table, sizes,
    BLOCK_K: gl.constexpr, TILE: gl.constexpr, LINEAR: gl.constexpr,
):  # fmt: skip
    q_s, row_s, q_full, q_empty, ring = memory
    k_s, v_s, full, empty = ring
    indices, counts, taken, width, n_q, n_valid, m_q, n_heads, n_rows = table
    n_pool, n_pool_tiles, n_words, last, scale = sizes
    PARTS: gl.constexpr = q_s.shape[0]
    D: gl.constexpr = q_s.shape[2]
    ROWS: gl.constexpr = k_s.shape[1]
    GROUPS: gl.constexpr = TILE // ROWS
    STAGES: gl.constexpr = k_s.shape[0] // (GROUPS * D // 64)
    SPLIT: gl.constexpr = BLOCK_K // ROWS
    POOL: gl.constexpr = d_pk is not None
    first, step = gl.program_id(0) * LANES + LANE, gl.num_programs(0) * LANES
    g, phase = 0, 0
    v_b, v_h, v_0, v_1, v_pool = 0, 0, n_valid, n_valid, 0
    i_step, i_next, live = first, first, True
    n_next = gl.load(counts + gl.minimum(first, n_rows - 1))
    # one step more than rows: see _consume
    while live:
        live = i_step < n_rows
        i_row = gl.minimum(i_step, n_rows - 1)
        n_kept = gl.where(live, n_next, 0)
        if taken is not None:
            b_taken = take(taken)
        p_idx = indices + i_row.to(gl.int64) * width
        n_left = n_valid - gl.load(p_idx + gl.maximum(n_kept - 1, 0)) * BLOCK_K
        n_tiles, n_groups, n_first = tiles(n_left, n_kept, ROWS, SPLIT, GROUPS)
        i_b, i_h, i_m = place(i_row, m_q, n_heads)
        mbarrier.wait(q_empty, phase ^ 1)
        phase ^= 1
        if taken is not None:
            tell(row_s, 0, i_step)
            tell(row_s, 1, n_tiles)
            tell(row_s, 2, n_first)
            mbarrier.arrive(q_full, count=1)
        mbarrier.expect(q_full, PARTS * 64 * D * 2)
        for part in gl.static_range(PARTS):
            i_q = gl.where(live, (i_m * PARTS + part) * 64, n_q)
            copy(d_q, i_b, i_h, i_q, q_full, q_s.index(part))
        n_all = n_tiles
        if POOL:
            n_all = n_tiles + gl.where(live, n_pool_tiles, 0)
        for i in range(n_all):
            j = gl.maximum(n_tiles - 1 - i, 0) * GROUPS
            i_0 = group(p_idx, j, n_groups, n_valid, BLOCK_K, ROWS)
            i_1 = i_0
            if GROUPS == 2:
                i_1 = group(p_idx, j + 1, n_groups, n_valid, BLOCK_K, ROWS)
            st = g % STAGES
            bar = full.index(st)
            mbarrier.wait(empty.index(st), (g // STAGES & 1) ^ 1)
            mbarrier.expect(bar, 4 * TILE * D)
            if POOL:
                pooled = i >= n_tiles
                if pooled:
                    i_0 = (i - n_tiles) * TILE
                    i_1 = i_0 + ROWS
                    copy_tile(d_pk, i_b, i_h, i_0, i_1, bar, k_s, st, GROUPS, D)
                    if LINEAR:
                        i_0 += D - TILE
                        i_1 += D - TILE
                else:
                    copy_tile(d_k, i_b, i_h, i_0, i_1, bar, k_s, st, GROUPS, D)
                if v_pool > 0:
                    copy_tile(d_pv, v_b, v_h, v_0, v_1, bar, v_s, st, GROUPS, D)
                else:
                    copy_tile(d_v, v_b, v_h, v_0, v_1, bar, v_s, st, GROUPS, D)
                v_pool = pooled.to(gl.int32)
            else:
                copy_tile(d_k, i_b, i_h, i_0, i_1, bar, k_s, st, GROUPS, D)
                copy_tile(d_v, v_b, v_h, v_0, v_1, bar, v_s, st, GROUPS, D)
            v_b, v_h, v_0, v_1 = i_b, i_h, i_0, i_1
            g += 1
            if i == n_all // 2:
                i_next = step + (i_step if taken is None else number(b_taken))
                n_next = gl.load(counts + gl.minimum(i_next, n_rows - 1))
        i_step = i_next


@gluon.jit
def _step(
    g, b_q, b_p, b_o, b_m, b_l, o_k, n_keys, pool, more, ring, scale
):  # fmt: skip
    """q·kᵀ of tile g beside p·v of the tile before, the softmax of the former under the latter.

    Only n_keys keys count, unless that is None. If pool is not None they are block means, with what
    pooled_logits takes and log2 of a block's tokens. Slot g has landed; if there are more, the next
    one has at the end. Returns p, the factor of the old sum, m, l, and o.
    """
    k_s, v_s, full, empty = ring
    STAGES: gl.constexpr = k_s.shape[0]
    TILE: gl.constexpr = k_s.shape[1]
    LAYOUT: gl.constexpr = b_q.type.layout.parent
    st = g % STAGES
    # [64, D] @ [D, TILE] -> [64, TILE]
    b_s = gl.zeros([64, TILE], gl.float32, LAYOUT)
    s_token = warpgroup_mma(b_q, k_s.index(st).permute((1, 0)), b_s, use_acc=False, is_async=True)
    # [64, TILE] @ [TILE, D] -> [64, D]
    o_token = warpgroup_mma(b_p, v_s.index(st), b_o, is_async=True)
    b_s = warpgroup_mma_wait(1, (s_token,)) * scale
    if n_keys is not None:
        b_s = gl.where(o_k[None, :] < n_keys, b_s, -float("inf"))
    if pool is not None:
        b_s = pooled_logits(b_s, o_k, pool[0], pool[1], pool[2])
        # what the logits of all means lack is taken from the reference instead
        b_new = gl.maximum(b_m, gl.max(b_s, 1) + pool[3])
    else:
        b_new = gl.maximum(b_m, gl.max(b_s, 1))
    # a row that has seen only masked keys keeps a maximum of -inf, and -inf - -inf is NaN
    b_ref = gl.where(b_new == -float("inf"), 0.0, b_new)
    b_w = gl.exp2(b_s - (b_ref if pool is None else b_ref - pool[3])[:, None])
    b_a = gl.exp2(b_m - b_ref)
    b_l = b_l * b_a + gl.sum(b_w, 1)
    b_p = gl.convert_layout(b_w.to(k_s.dtype), b_p.type.layout)
    # the next slot already here: in a straight line ptxas moves the softmax behind the wait for o
    mbarrier.wait(full.index((g + 1) % STAGES), (g + 1) // STAGES & 1, pred=more)
    b_o = warpgroup_mma_wait(0, (o_token,))
    mbarrier.arrive(empty.index(st), count=1)
    return b_p, b_a, b_new, b_l, b_o


@gluon.jit
def _consume(
    LANE: gl.constexpr, LANES: gl.constexpr, PART: gl.constexpr, o, o_s, s_o, lse, bits, ratio,
    shift, linear, memory, table, sizes, BLOCK_K: gl.constexpr, ROWS: gl.constexpr,
    PHI: gl.constexpr,
):  # fmt: skip
    q_s, row_s, q_full, q_empty, ring = memory
    k_s, v_s, full, empty = ring
    indices, counts, taken, width, n_q, n_valid, m_q, n_heads, n_rows = table
    n_pool, n_pool_tiles, n_words, last, scale = sizes
    total, bias, eps = linear
    PARTS: gl.constexpr = q_s.shape[0]
    TILE: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    SPLIT: gl.constexpr = BLOCK_K // ROWS
    FULL: gl.constexpr = 6.0 if BLOCK_K == 64 else 7.0
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA_S)
    ROW_O: gl.constexpr = gl.SliceLayout(1, MMA_O)
    dtype: gl.constexpr = k_s.dtype
    o_k = gl.arange(0, TILE, layout=gl.SliceLayout(0, MMA_S))
    b_p = gl.zeros([64, TILE], dtype, gl.DotOperandLayout(0, MMA_O, 2))
    b_o = gl.zeros([64, D], gl.float32, MMA_O)
    b_m = gl.full([64], -float("inf"), gl.float32, ROW)
    b_l = gl.zeros([64], gl.float32, ROW)
    first, step = gl.program_id(0) * LANES + LANE, gl.num_programs(0) * LANES
    g, phase = 0, 0
    i_row, i_done, live = first, first * 0 - 1, True
    i_next = gl.minimum(first, n_rows - 1)
    n_kept = gl.load(counts + i_next)
    p_last = indices + i_next.to(gl.int64) * width + gl.maximum(n_kept - 1, 0)
    n_left = n_valid - gl.load(p_last) * BLOCK_K
    mbarrier.wait(full.index(0), 0)
    # a step starts its row and finishes the one before, so that there is one step more than rows
    while live:
        mbarrier.wait(q_full, phase)
        phase ^= 1
        if taken is not None:
            i_row, n_tiles, n_first = told(row_s, 0), told(row_s, 1), told(row_s, 2)
            live = i_row < n_rows
        else:
            live = i_row < n_rows
            n_kept = gl.where(live, n_kept, 0)
            n_tiles, _, n_first = tiles(n_left, n_kept, ROWS, SPLIT, TILE // ROWS)
        b_q = q_s.index(PART).load(gl.DotOperandLayout(0, MMA_S, 2))
        fence_async_shared()
        mbarrier.arrive(q_empty, count=1)
        b_none = gl.full([64], -float("inf"), gl.float32, ROW)
        b_zero = gl.zeros([64], gl.float32, ROW)
        b_p, b_a, b_m1, b_l1, b_o = _step(
            g, b_q, b_p, b_o, b_none, b_zero, o_k, n_first, None, live, ring, scale
        )
        g += 1
        if i_done >= 0:
            i_q = (i_done % m_q * PARTS + PART) * 64
            finish(
                o, o_s, s_o, lse, ratio, shift, bias, b_o, b_m, b_l, i_done, i_q, n_q, m_q,
                n_heads, D,
            )  # fmt: skip
        b_o = gl.zeros([64, D], gl.float32, MMA_O)
        b_m, b_l = b_m1, b_l1
        if taken is None:
            # read early what the next step needs: the tiles of this row hide the latency
            i_next = gl.minimum(i_row + step, n_rows - 1)
            n_kept = gl.load(counts + i_next)
        if bits is not None:
            p_bits = bits + gl.minimum(i_row, n_rows - 1).to(gl.int64) * n_words
            w = words(p_bits, TILE)
        for _ in range(1, n_tiles):
            b_p, b_a, b_m, b_l, b_o = _step(
                g, b_q, b_p, b_o, b_m, b_l, o_k, None, None, True, ring, scale
            )
            b_o = b_o * gl.convert_layout(b_a, ROW_O)[:, None]
            g += 1
        if bits is not None:
            for i in range(gl.where(live, n_pool_tiles, 0)):
                pool = (w, n_pool - i * TILE, last, FULL)
                # the words of the next tile are on their way during this one
                w = words(p_bits + gl.minimum(i + 1, n_pool_tiles - 1) * (TILE // 32), TILE)
                b_p, b_a, b_m, b_l, b_o = _step(
                    g, b_q, b_p, b_o, b_m, b_l, o_k, None, pool, True, ring, scale
                )
                b_o = b_o * gl.convert_layout(b_a, ROW_O)[:, None]
                g += 1
        if total is not None:  # noqa: SIM102 (known to the compiler, unlike the next)
            if live:
                p_z = total + (i_row // m_q).to(gl.int64) * D
                b_p, b_l, b_o = linear_end(g, b_q, b_p, b_o, b_l, p_z, eps, ring, PHI)
                g += 1
        i_done = i_row
        if taken is None:
            p_last = indices + i_next.to(gl.int64) * width + gl.maximum(n_kept - 1, 0)
            n_left = n_valid - gl.load(p_last) * BLOCK_K
            i_row = i_row + step
    tma.store_wait(0)


@gluon.jit
def _allocated(
    dtype: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr,
    ROWS: gl.constexpr, STAGES: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """Shared memory and barriers of a producer and its warpgroups, as it is copied to and as it is
    multiplied."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    PANELS: gl.constexpr = STAGES * (TILE // ROWS) * (D // 64)
    q_s = gl.allocate_shared_memory(dtype, [PARTS, 64, D], SHARED)
    k_s = gl.allocate_shared_memory(dtype, [PANELS, ROWS, 64], SHARED)
    v_s = gl.allocate_shared_memory(dtype, [PANELS, ROWS, 64], SHARED)
    row_s = gl.allocate_shared_memory(gl.int32, [3, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=2 if COUNTED else 1)
    mbarrier.init(q_empty, count=PARTS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    copied = (q_s, row_s, q_full, q_empty, (k_s, v_s, full, empty))
    k_s, v_s = whole(k_s, TILE, D, SHARED), whole(v_s, TILE, D, SHARED)
    return copied, (q_s, row_s, q_full, q_empty, (k_s, v_s, full, empty))


_SIZES = ["n_q", "n_valid", "width", "m_q", "n_heads", "n_rows", "n_pool", "n_pool_tiles"]
_SIZES += ["n_words", "last"]


@gluon.jit(do_not_specialize=_SIZES)
def _block_sparse_attention_hopper_fwd_kernel(
    d_q, d_k, d_v, o, s_o, d_pk, d_pv, lse, bits, ratio, shift, total, bias, indices, counts,
    taken, n_q, n_valid, width, m_q, n_heads, n_rows, n_pool, n_pool_tiles, n_words, last,
    scale, eps,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, PHI: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES > 1)
    LINEAR: gl.constexpr = total is not None
    COUNTED: gl.constexpr = taken is not None
    table = (indices, counts, taken, width, n_q, n_valid, m_q, n_heads, n_rows)
    sizes = (n_pool, n_pool_tiles, n_words, last, scale)
    linear = (total, bias, eps)
    if BLOCK_Q == 128:
        dtype: gl.constexpr = d_k.dtype
        SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        o_s = gl.allocate_shared_memory(dtype, [2, 64, D], SHARED)
        copied, memory = _allocated(dtype, 2, D, TILE, ROWS, STAGES, COUNTED)
        fence_async_shared()
        gl.warp_specialize([
            (_consume, (0, 1, 0, o, o_s.index(0), None, lse, bits, ratio, shift, linear, memory,
                        table, sizes, BLOCK_K, ROWS, PHI)),
            (_consume, (0, 1, 1, o, o_s.index(1), None, lse, bits, ratio, shift, linear, memory,
                        table, sizes, BLOCK_K, ROWS, PHI)),
            (_produce, (0, 1, d_q, d_k, d_v, d_pk, d_pv, copied, table, sizes, BLOCK_K, TILE,
                        LINEAR)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        c0, m0 = _allocated(d_k.dtype, 1, D, TILE, ROWS, STAGES, COUNTED)
        c1, m1 = _allocated(d_k.dtype, 1, D, TILE, ROWS, STAGES, COUNTED)
        fence_async_shared()
        gl.warp_specialize([
            (_consume, (0, 2, 0, o, None, s_o, lse, bits, ratio, shift, linear, m0, table, sizes,
                        BLOCK_K, ROWS, PHI)),
            (_consume, (1, 2, 0, o, None, s_o, lse, bits, ratio, shift, linear, m1, table, sizes,
                        BLOCK_K, ROWS, PHI)),
            (_produce, (0, 2, d_q, d_k, d_v, d_pk, d_pv, c0, table, sizes, BLOCK_K, TILE, LINEAR)),
            (_produce, (1, 2, d_q, d_k, d_v, d_pk, d_pv, c1, table, sizes, BLOCK_K, TILE, LINEAR)),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip
