"""What the Hopper kernels share, in Gluon: the walk over a row's tiles, TMA's copies, the store."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# triton 3.6 has other names than later ones
box_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
box_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def place(i_row, m_q, n_heads):
    """Batch, head and query block of a row of the table."""
    i_bh = i_row // m_q
    return i_bh // n_heads, i_bh % n_heads, i_row % m_q


@gluon.jit
def tiles(n_left, n_kept, ROWS: gl.constexpr, SPLIT: gl.constexpr, GROUPS: gl.constexpr):
    """Tiles of a row, its groups, and the valid tokens of its last tile, given those after the
    start of its last block; a row without a block has one tile without a token."""
    n_last = gl.minimum((n_left + ROWS - 1) // ROWS, SPLIT)
    n_groups = gl.where(n_kept > 0, (n_kept - 1) * SPLIT + n_last, 0)
    n_tiles = gl.maximum((n_groups + GROUPS - 1) // GROUPS, 1)
    n_valid = gl.minimum(n_left - (n_last - 1) * ROWS, ROWS)
    if GROUPS == 2:
        n_valid += gl.where(n_groups % 2 == 0, ROWS, 0)
    return n_tiles, n_groups, gl.where(n_kept > 0, n_valid, 0)


@gluon.jit
def take(taken):
    """Ask for the next number of a counter, in one thread of a warp.

    A scalar would be waited for at once, to tell the other threads; so would one address for all,
    which ptxas adds up over the warp first.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    o_t = gl.arange(0, 32, layout=LAYOUT)
    b_one = gl.full([32], 1, gl.int32, LAYOUT)
    return gl.atomic_add(taken + o_t, b_one, mask=o_t == 0, sem="relaxed")


@gluon.jit
def number(b_taken):
    """What was asked for, in all threads."""
    o_t = gl.arange(0, 32, layout=b_taken.type.layout)
    return gl.max(gl.where(o_t == 0, b_taken, 0), 0)


@gluon.jit
def tell(row_s, i: gl.constexpr, x):
    """Leave number i for the warpgroups."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    row_s.index(i).store(gl.full([32], 0, gl.int32, LAYOUT) + x)


@gluon.jit
def told(row_s, i: gl.constexpr):
    """Number i that the producer left."""
    return gl.max(row_s.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def words(p_bits, TILE: gl.constexpr):
    """The bits of a tile of blocks, 32 a word."""
    w = (gl.load(p_bits), gl.load(p_bits + 1))
    if TILE == 128:
        w = (w[0], w[1], gl.load(p_bits + 2), gl.load(p_bits + 3))
    return w


@gluon.jit
def group(p_idx, j, n_groups, n_valid, BLOCK_K: gl.constexpr, ROWS: gl.constexpr):
    """Where the keys of group j of a row begin; beyond all keys where there is none."""
    SPLIT: gl.constexpr = BLOCK_K // ROWS
    here = j < n_groups
    j = gl.where(here, j, 0)
    i_k = gl.load(p_idx + j // SPLIT) * BLOCK_K + j % SPLIT * ROWS
    return gl.where(here, i_k, n_valid)


@gluon.jit
def _seen_as(x_s, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory in another shape and layout."""
    if _REINTERPRETS:
        return x_s.reinterpret(x_s.dtype, SHAPE, LAYOUT)
    else:
        return x_s._reinterpret(x_s.dtype, SHAPE, LAYOUT)


@gluon.jit
def box(x_s, desc):
    """Shared memory [R, D] as the box [1, 1, R, D] of a descriptor."""
    shape: gl.constexpr = [1, 1, x_s.shape[0], x_s.shape[1]]
    layout: gl.constexpr = desc.layout
    return _seen_as(x_s, shape, layout)


@gluon.jit
def whole(x_s, TILE: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """The panels [ROWS, 64] of copied tiles as the tiles [TILE, D] that are multiplied, or the
    reverse."""
    SIZE: gl.constexpr = x_s.shape[0] * x_s.shape[1] * x_s.shape[2]
    shape: gl.constexpr = [SIZE // (TILE * D), TILE, D]
    return _seen_as(x_s, shape, LAYOUT)


@gluon.jit
def copy(desc, i_b, i_h, i_n, bar, x_s):
    """Start the copy of the rows at i_n of a head into shared memory."""
    box_in(desc, [i_b, i_h, i_n, 0], bar, box(x_s, desc))


@gluon.jit
def copy_tile(desc, i_b, i_h, i_0, i_1, bar, x_s, st, GROUPS: gl.constexpr, D: gl.constexpr):
    """Start the copies of a tile, whose groups begin at i_0 and i_1, into slot st: its panels of
    64 columns one after the other, as products read them."""
    for panel in gl.static_range(D // 64):
        at = (st * (D // 64) + panel) * GROUPS
        box_in(desc, [i_b, i_h, i_0, panel * 64], bar, box(x_s.index(at), desc))
        if GROUPS == 2:
            box_in(desc, [i_b, i_h, i_1, panel * 64], bar, box(x_s.index(at + 1), desc))


@gluon.jit
def finish(
    o, o_s, s_o, lse, ratio, shift, bias, b_o, b_m, b_l, i_row, i_q, n_q, m_q, n_heads,
    D: gl.constexpr,
):  # fmt: skip
    """Store 64 rows: r·O + C, and their LSE; zeros and -inf without a valid key. By o's descriptor
    through shared memory, or, without that, to o at strides s_o."""
    i_b, i_h, _ = place(i_row, m_q, n_heads)
    b_full = gl.where(b_l > 0, b_l, 1.0)
    if lse is not None:
        o_q = i_q + gl.arange(0, 64, layout=b_m.type.layout)
        b_lse = (b_m + gl.log2(b_full)) * 0.6931471805599453
        gl.store(lse + (i_row // m_q).to(gl.int64) * n_q + o_q, b_lse, mask=o_q < n_q)
    b_r = 1.0 / b_full
    if ratio is not None:
        b_r = b_r * gl.load(ratio + i_row)
    b_o = b_o * gl.convert_layout(b_r, gl.SliceLayout(1, b_o.type.layout))[:, None]
    if shift is not None:
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, b_o.type.layout))
        b_o += gl.load(shift + i_row.to(gl.int64) * D + o_d)[None, :]
    if bias is not None:
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, b_o.type.layout))
        b_o += gl.load(bias + o_d).to(gl.float32)[None, :]
    if o_s is None:
        o_q = i_q + gl.arange(0, 64, layout=gl.SliceLayout(1, b_o.type.layout))
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, b_o.type.layout))
        p_o = o + i_b.to(gl.int64) * s_o[0] + i_h.to(gl.int64) * s_o[1]
        p_o += (o_q.to(gl.int64) * s_o[2])[:, None] + o_d[None, :]
        gl.store(p_o, b_o, mask=(o_q < n_q)[:, None])
    else:
        # the store before this one may still read the memory
        tma.store_wait(0)
        o_s.store(b_o.to(o_s.dtype))
        fence_async_shared()
        box_out(o, [i_b, i_h, i_q, 0], box(o_s, o))
