"""What a row of the Hopper kernel may add to its kept keys, in Gluon: means, linear attention."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def pooled_logits(b_s, o_k, bits, n_left, last):
    """Logits of n_left block means: -inf where a block's bit is set, `last` more for the last."""
    b_w = gl.where(o_k < 32, bits[0], bits[1])
    if len(bits) == 4:
        b_w = gl.where(o_k < 64, b_w, gl.where(o_k < 96, bits[2], bits[3]))
    # a bit as the sign of its word, then as 0 or -inf: in this form a thread shifts a word twice by
    # what it does not know, and then by constants
    b_w = (b_w << (7 - o_k % 8)) << (24 - o_k // 8 % 4 * 8)
    b_w = (b_w >> 31) & -8388608
    b_s += b_w.to(gl.float32, bitcast=True)[None, :]
    if n_left <= o_k.shape[0]:
        b_s += gl.where(o_k == n_left - 1, last, 0.0)[None, :]
    return b_s


@gluon.jit
def _features(b_x, PHI: gl.constexpr):
    """φ of rows in fp32: softmax, elu + 1 or relu."""
    b_x = b_x.to(gl.float32)
    if PHI == 0:
        b_x = gl.exp(b_x - gl.max(b_x, 1)[:, None])
        b_x = b_x * (1.0 / gl.sum(b_x, 1))[:, None]
    elif PHI == 1:
        b_x = gl.where(b_x > 0, b_x + 1.0, gl.exp(gl.minimum(b_x, 0.0)))
    else:
        b_x = gl.maximum(b_x, 0.0)
    return b_x


@gluon.jit
def linear_end(g, b_q, b_p, b_o, b_l, p_z, eps, ring, PHI: gl.constexpr):
    """p·v of a row's last tile and, under it, φ(q) and n = φ(q)·z + ε; then n/l·o + φ(q)·S.

    Slot g holds the first TILE rows of S in the place of K. What is left of S is the V of the next
    slot and φ(q) for it the p that is returned, with o, whose sum of weights is then n: nothing is
    divided before the products, as 1/n may be beyond float16.
    """
    k_s, v_s, full, empty = ring
    STAGES: gl.constexpr = k_s.shape[0]
    TILE: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    LAYOUT: gl.constexpr = b_q.type.layout
    st = g % STAGES
    # [64, TILE] @ [TILE, D] -> [64, D]
    o_token = warpgroup_mma(b_p, v_s.index(st), b_o, is_async=True)
    b_f = _features(b_q, PHI)
    b_z = gl.load(p_z + gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT)))
    b_n = gl.convert_layout(gl.sum(b_f * b_z[None, :], 1), b_l.type.layout) + eps
    b_r = b_n / gl.where(b_l > 0, b_l, 1.0)
    mbarrier.wait(full.index((g + 1) % STAGES), (g + 1) // STAGES & 1)
    b_o = warpgroup_mma_wait(0, (o_token,))
    b_o = b_o * gl.convert_layout(b_r, gl.SliceLayout(1, b_o.type.layout))[:, None]
    b_f = b_f.to(k_s.dtype)
    if D > TILE:
        b_f0, b_f = gl.split(b_f.reshape((64, 2, TILE)).permute((0, 2, 1)))
        # [64, TILE] @ [TILE, D] -> [64, D]
        b_f0 = gl.convert_layout(b_f0, b_p.type.layout)
        o_token = warpgroup_mma(b_f0, k_s.index(st), b_o, is_async=True)
        b_o = warpgroup_mma_wait(0, (o_token,))
    mbarrier.arrive(empty.index(st), count=1)
    return gl.convert_layout(b_f, b_p.type.layout), b_n, b_o
