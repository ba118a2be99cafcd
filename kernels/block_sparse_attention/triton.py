"""Block-sparse attention on CUDA, in Triton: one program per row of the block table.

    s_ij = scale·q_i·k_j,   LSE_i = log Σ_{j∈S} e^{s_ij},   O_i = Σ_{j∈S} e^{s_ij − LSE_i} v_j

The online softmax is that of FlashAttention (arXiv 2205.14135), over the kept blocks only. The
table is sorted, so a block with masked tokens comes last: it is peeled off, and no load of the main
loop is masked or conditional.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.kernels.block_sparse_attention.triton_backward import backward
from dit_accel.kernels.launch import (
    Launch,
    capability_of,
    find,
    run,
    split_head_dim,
    unsupported,
)
from dit_accel.kernels.tiles import (
    absorb,
    bit_row,
    key_limits,
    load_tile,
    log2_scale,
    pool_bias,
    scores,
    table_rows,
    tile_pointers,
    whole_blocks,
)
from dit_accel.table import BlockTable

__all__ = ["backward", "block_sparse_attention", "supports"]


@triton.jit
def _store_tile(p_o, b_o, p_c, o_q, n_q):
    """Rows of O, plus the row vector at `p_c` if given, in the dtype of the output."""
    if p_o is not None:
        if p_c is not None:
            b_o += tl.load(p_c)[None, :]
        tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=o_q[:, None] < n_q)


@triton.jit(do_not_specialize=["n_q", "n_k", "n_pool", "width"])
def _block_sparse_attention_fwd_kernel(
    q, k, v, desc_k, desc_v, o, lse, indices, counts, kv_len,
    s_q, s_k, s_v, s_o, n_q, n_k, width, scale,
    pool_k, pool_v, bits, n_pool, ratio, shift,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr,
    PADDED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, LAZY: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_row = i_bh * tl.num_programs(0) + i_m
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    D: tl.constexpr = D0 + D1
    p_idx = indices + i_row * width
    n_kept = tl.load(counts + i_row)
    n_whole = whole_blocks(p_idx, n_kept, n_valid, BLOCK_K, PADDED)

    i_q = i_m.to(tl.int64) * BLOCK_Q
    o_q = i_m * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, TILE_K)
    x_q = q + i_b.to(tl.int64) * s_q[0] + i_h.to(tl.int64) * s_q[1] + i_q * s_q[2]
    x_k = k + i_b.to(tl.int64) * s_k[0] + i_h.to(tl.int64) * s_k[1]
    x_v = v + i_b.to(tl.int64) * s_v[0] + i_h.to(tl.int64) * s_v[1]
    b_q = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D0, 0), 0, o_q, n_q, True)
    b_q1 = load_tile(tile_pointers(x_q, s_q[2], s_q[3], BLOCK_Q, D1, D0), 0, o_q, n_q, True)
    p_k = tile_pointers(x_k, s_k[2], s_k[3], TILE_K, D0, 0)
    p_k1 = tile_pointers(x_k, s_k[2], s_k[3], TILE_K, D1, D0)
    p_v = tile_pointers(x_v, s_v[2], s_v[3], TILE_K, D0, 0)
    p_v1 = tile_pointers(x_v, s_v[2], s_v[3], TILE_K, D1, D0)
    b_o = tl.zeros([BLOCK_Q, D0], tl.float32)
    b_o1 = tl.zeros([BLOCK_Q, D1 if D1 > 0 else 1], tl.float32)
    b_m = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_Q], tl.float32)

    for i in tl.range(0, n_whole * SPLIT, num_stages=STAGES):
        i_k = tl.load(p_idx + i // SPLIT) * BLOCK_K + i % SPLIT * TILE_K
        if desc_k is not None:
            b_k = desc_k.load([i_b, i_h, i_k, 0]).reshape([TILE_K, D0])
            b_v = desc_v.load([i_b, i_h, i_k, 0]).reshape([TILE_K, D0])
        else:
            b_k = load_tile(p_k, i_k.to(tl.int64) * s_k[2], o_k, n_k, False)
            b_v = load_tile(p_v, i_k.to(tl.int64) * s_v[2], o_k, n_k, False)
        b_k1 = load_tile(p_k1, i_k.to(tl.int64) * s_k[2], o_k, n_k, False)
        b_v1 = load_tile(p_v1, i_k.to(tl.int64) * s_v[2], o_k, n_k, False)
        b_s = scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale
        b_o, b_o1, b_m, b_l = absorb(b_s, b_v, b_v1, b_o, b_o1, b_m, b_l, PRECISION, LAZY)

    # only the ragged last block, and blocks cut by kv_len, pay for a mask
    for i in tl.range(n_whole * SPLIT, n_kept * SPLIT, num_stages=1):
        i_k = tl.load(p_idx + i // SPLIT) * BLOCK_K + i % SPLIT * TILE_K
        n_left = n_valid - i_k
        b_k = load_tile(p_k, i_k.to(tl.int64) * s_k[2], o_k, n_left, True)
        b_v = load_tile(p_v, i_k.to(tl.int64) * s_v[2], o_k, n_left, True)
        b_k1 = load_tile(p_k1, i_k.to(tl.int64) * s_k[2], o_k, n_left, True)
        b_v1 = load_tile(p_v1, i_k.to(tl.int64) * s_v[2], o_k, n_left, True)
        b_s = scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale
        b_s = tl.where(o_k[None, :] < n_left, b_s, -float("inf"))
        b_o, b_o1, b_m, b_l = absorb(b_s, b_v, b_v1, b_o, b_o1, b_m, b_l, PRECISION, LAZY)

    if pool_k is not None:
        x_p, x_pv = pool_k + i_bh * n_pool * D, pool_v + i_bh * n_pool * D
        p_bits = bit_row(bits, i_row, n_pool)
        p_k = tile_pointers(x_p, D, 1, TILE_K, D0, 0)
        p_k1 = tile_pointers(x_p, D, 1, TILE_K, D1, D0)
        p_v = tile_pointers(x_pv, D, 1, TILE_K, D0, 0)
        p_v1 = tile_pointers(x_pv, D, 1, TILE_K, D1, D0)
        for i in tl.range(0, tl.cdiv(n_valid, TILE_K * BLOCK_K), num_stages=STAGES):
            b_bias = pool_bias(p_bits, i * TILE_K + o_k, n_valid, BLOCK_K)
            b_k = load_tile(p_k, i * TILE_K * D, o_k, n_k, False)
            b_v = load_tile(p_v, i * TILE_K * D, o_k, n_k, False)
            b_k1 = load_tile(p_k1, i * TILE_K * D, o_k, n_k, False)
            b_v1 = load_tile(p_v1, i * TILE_K * D, o_k, n_k, False)
            b_s = scores(b_q, b_q1, b_k, b_k1, PRECISION) * scale + b_bias[None, :]
            b_o, b_o1, b_m, b_l = absorb(b_s, b_v, b_v1, b_o, b_o1, b_m, b_l, PRECISION, LAZY)

    # a row without a valid key gives zeros and -inf
    b_full = tl.where(b_l > 0, b_l, 1.0)
    b_r = 1.0 / b_full
    if lse is not None:
        b_lse = (b_m + tl.log2(b_full)) * 0.6931471805599453
        tl.store(lse + i_bh * n_q + o_q, b_lse, mask=o_q < n_q)
    p_c = None
    p_c1 = None
    if shift is not None:
        b_r = b_r * tl.load(ratio + i_row)
        p_c = shift + i_row * D + tl.arange(0, D0)
        if D1 > 0:
            p_c1 = shift + i_row * D + D0 + tl.arange(0, D1)
    x_o = o + i_b.to(tl.int64) * s_o[0] + i_h.to(tl.int64) * s_o[1] + i_q * s_o[2]
    _store_tile(
        tile_pointers(x_o, s_o[2], s_o[3], BLOCK_Q, D0, 0), b_o * b_r[:, None], p_c, o_q, n_q
    )
    _store_tile(
        tile_pointers(x_o, s_o[2], s_o[3], BLOCK_Q, D1, D0), b_o1 * b_r[:, None], p_c1, o_q, n_q
    )


def supports(q: Tensor, *, block_q: int = 64, block_k: int = 64, **_: object) -> str | None:
    """None if this file serves the call, else the reason why not."""
    return unsupported(q, block_q, block_k)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    return_lse: bool = False,
    kv_len: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.block_sparse_attention; the output has the layout of q."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    launch = find("forward", capability_of(q), q.shape[-1], table.block_q)
    attend(q, k, v, out, lse, table, launch, scale, kv_len)
    return out if lse is None else (out, lse)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    table: BlockTable,
    launch: Launch,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    pool: tuple[Tensor, Tensor, Tensor] | None = None,
    rectify: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Run the forward kernel: that of Hopper where the launch names it and it serves the call."""
    call = (q, k, v, out, lse, table, launch, scale, kv_len, pool, rectify)
    if launch.specialized and q.is_cuda:
        from dit_accel.kernels.block_sparse_attention import gluon as hopper

        if hopper.unserved(*call) is None:
            return hopper.attend(*call)
        plain = find("forward", capability_of(q), q.shape[-1], table.block_q, specialized=False)
        call = (*call[:6], plain, *call[7:])
    run(_block_sparse_attention_fwd_kernel, *forward(*call))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    table: BlockTable,
    launch: Launch,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    pool: tuple[Tensor, Tensor, Tensor] | None = None,
    rectify: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the forward kernel.

    Args:
        pool: k̄ and v̄ [B, H, Mp, D], Mp key blocks rounded up to whole tiles, and `kept_bits` of
            the table: skipped blocks join the softmax as one key each.
        rectify: r [B, H, Mq] and C [B, H, Mq, D], float32: the result becomes r·O + C.
    """
    limits = key_limits(k, kv_len)
    d0, d1 = split_head_dim(q.shape[-1])
    tile = min(launch.tile, table.block_k)
    descriptors = _descriptors(k, v, tile) if launch.descriptors and d1 == 0 else (None, None)
    pool_k, pool_v, bits = pool or (None, None, None)
    ratio, shift = rectify or (None, None)
    indices, width = table_rows(table)
    arguments = {
        "q": q, "k": k, "v": v, "desc_k": descriptors[0], "desc_v": descriptors[1], "o": out,
        "lse": lse,
        "indices": indices, "counts": table.counts.contiguous(), **limits,
        "s_q": q.stride(), "s_k": k.stride(), "s_v": v.stride(), "s_o": out.stride(),
        "n_q": q.shape[2], "width": width, "scale": log2_scale(scale, q),
        "pool_k": pool_k, "pool_v": pool_v, "bits": bits,
        "n_pool": 0 if pool_k is None else pool_k.shape[2],
        "ratio": ratio, "shift": shift, "BLOCK_Q": table.block_q, "BLOCK_K": table.block_k,
        "TILE_K": tile,
        "D0": d0, "D1": d1, "STAGES": launch.stages, "PRECISION": launch.precision,
        "LAZY": launch.lazy,
    }  # fmt: skip
    return (table.counts.shape[2], q.shape[1], q.shape[0]), arguments, launch


def _descriptors(
    k: Tensor, v: Tensor, tile: int
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Tensor descriptors of [1, 1, tile, D] boxes, or None where a layout rules them out."""
    for x in (k, v):
        step = 16 // x.element_size()
        if (
            x.stride(-1) != 1
            or x.data_ptr() % 16
            or any(s % step or s <= 0 for s in x.stride()[:-1])
        ):
            return None, None
    return tuple(
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile, x.shape[-1]])
        for x in (k, v)
    )
