"""What the attention kernels share: tiles, scores, one step of the online softmax.

A head dimension is one part of D0 columns or two of D0 + D1 (80 = 64 + 16, 96 = 64 + 32), so that
no product is padded and no load is masked by column; the second part is None when there is none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.table import BlockTable

_LOG2E = 1.4426950408889634


@triton.jit
def tile_pointers(x, stride_n, stride_d, T: tl.constexpr, D: tl.constexpr, START: tl.constexpr):
    """Pointers [T, D] to T rows and columns START … START + D of the matrix at `x`; None when D is
    0."""
    p_x = None
    if D > 0:
        p_x = (
            x + tl.arange(0, T)[:, None] * stride_n + (START + tl.arange(0, D))[None, :] * stride_d
        )
    return p_x


@triton.jit
def load_tile(p_x, offset, o_x, n_left, MASKED: tl.constexpr):
    """The tile [T, D] at `offset`; if MASKED, rows `o_x` at or beyond `n_left` read as zero."""
    b_x = None
    if p_x is not None:
        if MASKED:
            b_x = tl.load(p_x + offset, mask=o_x[:, None] < n_left, other=0.0)
        else:
            b_x = tl.load(p_x + offset)
    return b_x


@triton.jit
def scores(b_q, b_q1, b_k, b_k1, PRECISION: tl.constexpr):
    """q·kᵀ in fp32, the head dimension in one part or two."""
    # [BQ, D0] @ [D0, BK] -> [BQ, BK]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if b_q1 is not None:
        # [BQ, D1] @ [D1, BK] -> [BQ, BK]
        b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def absorb(
    b_s, b_v, b_v1, b_o, b_o1, b_m, b_l, PRECISION: tl.constexpr, LAZY: tl.constexpr = 0.0
):  # fmt: skip
    """One step of the online softmax: logits in log2 units [BQ, BK] and their values.

    LAZY: weights stay relative to an earlier maximum until one exceeds it by more, and the sums are
    rescaled only then (FlashAttention-4); 0: at every step.
    """
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    if LAZY > 0:
        b_new = tl.where(b_new > b_m + LAZY, b_new, b_m)
    # a row that has seen only masked keys keeps a maximum of -inf, and -inf - -inf is NaN
    b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_ref[:, None])
    b_a = tl.exp2(b_m - b_ref)
    if LAZY == 0:
        b_l = b_l * b_a + tl.sum(b_p, 1)
    else:
        if tl.max((b_new > b_m).to(tl.int32), 0) > 0:
            b_l = b_l * b_a
            b_o = b_o * b_a[:, None]
            if b_v1 is not None:
                b_o1 = b_o1 * b_a[:, None]
        b_l += tl.sum(b_p, 1)
    b_p = b_p.to(b_v.dtype)
    if LAZY == 0:
        b_o = b_o * b_a[:, None]
    # [BQ, BK] @ [BK, D0] -> [BQ, D0]
    b_o = tl.dot(b_p, b_v, b_o, input_precision=PRECISION)
    if b_v1 is not None:
        if LAZY == 0:
            b_o1 = b_o1 * b_a[:, None]
        # [BQ, BK] @ [BK, D1] -> [BQ, D1]
        b_o1 = tl.dot(b_p, b_v1, b_o1, input_precision=PRECISION)
    return b_o, b_o1, b_new, b_l


@triton.jit
def whole_blocks(p_idx, n_kept, n_valid, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """How many leading entries of a sorted row name blocks without a masked token."""
    if PADDED:
        n_whole = n_kept * 0
        for i in range(0, n_kept, 128):
            o_i = i + tl.arange(0, 128)
            b_i = tl.load(p_idx + o_i, mask=o_i < n_kept, other=2147483647)
            n_whole += tl.sum((b_i < n_valid // BLOCK).to(tl.int32))
        return n_whole
    last = tl.load(p_idx + n_kept - 1, mask=n_kept > 0, other=-1)
    return n_kept - (last >= n_valid // BLOCK).to(tl.int32)


@triton.jit
def bit_row(bits, i_row, m_k):
    """Where the words of a row of `kept_bits` of m_k blocks begin."""
    return bits + i_row * (tl.cdiv(m_k, 128) * 4)


@triton.jit
def pool_bias(p_bits, o_m, n_valid, BLOCK: tl.constexpr):
    """log2 of the valid tokens of blocks `o_m`; -inf for kept blocks and those without a token."""
    b_size = (n_valid - o_m * BLOCK).to(tl.float32)
    b_bias = tl.log2(tl.clamp(b_size, 1.0, BLOCK))
    b_kept = (tl.load(p_bits + o_m // 32) >> (o_m % 32)) & 1
    return tl.where((b_kept == 0) & (b_size > 0), b_bias, -float("inf"))


def key_limits(k: Tensor, kv_len: int | Tensor | None) -> dict[str, object]:
    """The kernel arguments that say how many keys are valid."""
    per_sample = isinstance(kv_len, Tensor)
    return {
        "kv_len": kv_len if per_sample else None,
        "n_k": k.shape[2] if kv_len is None or per_sample else min(kv_len, k.shape[2]),
        "PADDED": kv_len is not None,
    }


def table_rows(table: BlockTable) -> tuple[Tensor, int]:
    """The indices of a table and the stride of its rows: 0 where all rows are one."""
    if any(table.indices.stride()[:3]):
        indices = table.indices.contiguous()
        return indices, indices.shape[-1]
    return table.indices[0, 0, 0], 0


def log2_scale(scale: float | None, q: Tensor) -> float:
    """The softmax scale for powers of two instead of e."""
    return _LOG2E * (q.shape[-1] ** -0.5 if scale is None else scale)
