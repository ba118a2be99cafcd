"""Block-sparse attention in eight bits on CUDA, in Triton: int8 q·kᵀ, e4m3 weights and values.

    s_ij = a_i b_J · q8_i·k8_j + scale·q_i·k̄,   O_i = Σ_J 2^(e_J) Σ_{j∈J} P8_ij v8_j / Σ_j P_ij

a is a scale per query, b and 2^e one per group J of keys (a tile), k̄ what was subtracted from the
keys: the same for all keys of a query, it only enters LSE. On Hopper groups are taken in pairs,
which halves the work per key on the accumulator. See README.md beside this file.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.kernels.int8_attention.quantize import FLOOR, Quantized, quantize, round_int8
from dit_accel.kernels.launch import Launch, capability_of, find, run, unsupported
from dit_accel.kernels.tiles import key_limits, log2_scale, table_rows, whole_blocks
from dit_accel.table import BlockTable

__all__ = ["int8_attention", "supports"]


@triton.jit
def _load_group(p_k, p_v, i_k, i_v, p_scale, p_exponent, i_t, TILE: tl.constexpr, DP: tl.constexpr):
    """Keys [TILE, DP] and values [DP, TILE] of group i_t of a head, scale and exponent.

    p_k, p_v: pointers, or descriptors in whose rows the head begins at i_k and i_v.
    """
    if i_k is not None:
        b_k, b_v = p_k.load([i_k + i_t * TILE, 0]), p_v.load([i_v, i_t * TILE])
    else:
        b_k, b_v = tl.load(p_k + i_t.to(tl.int64) * TILE * DP), tl.load(p_v + i_t * TILE)
    return b_k, b_v, tl.load(p_scale + i_t), tl.load(p_exponent + i_t)


@triton.jit
def _above(b_m):
    """m, rounded up: no weight exceeds 448, though s·c is subtracted from m without rounding."""
    return b_m + tl.abs(b_m) * 1.1920928955078125e-07


@triton.jit
def _products(b_q, b_k, b_a, w_k, o_t, n_left, MASKED: tl.constexpr):
    """q8·k8 [BQ, T] as float32, the scale [BQ] that makes it log2 units, its row maxima in them."""
    # [BQ, DP] @ [DP, T] -> [BQ, T]
    b_s = tl.dot(b_q, tl.trans(b_k), out_dtype=tl.int32).to(tl.float32)
    if MASKED:
        b_s = tl.where(o_t[None, :] < n_left, b_s, -float("inf"))
    # a step of 8 tells any two integers apart, and keeps maxima below 2^24
    b_c = tl.minimum(b_a * w_k, 8.0)
    return b_s, b_c, tl.max(b_s, 1) * b_c


@triton.jit
def _operand(b_p, BQ: tl.constexpr, T: tl.constexpr, dtype: tl.constexpr):
    """Weights in the dtype of the values, and for e4m3 in their order."""
    if dtype.primitive_bitwidth == 8:
        # the order of quantize.shuffled
        b_p = b_p.reshape([BQ, T // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4).reshape([BQ, T])
    return b_p.to(dtype)


@triton.jit
def _absorb(
    group, other, n_left, b_q, b_a, o_t, b_o, b_m, b_l, e_o,
    BQ: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over a group of keys, and an `other` unless that is None.

    A weight is 448·2^(s·c − m + e − e_n), where 2^e is the scale of its group's values and e_n the
    largest e so far: e4m3 ends at 448. b_o is in units of 2^e_o.
    """
    b_k, b_v, w_k, e_v = group
    b_s, b_c, b_top = _products(b_q, b_k, b_a, w_k, o_t, n_left, MASKED)
    b_new, e_n = tl.maximum(b_m, b_top), tl.maximum(e_o, e_v)
    if other is not None:
        b_k1, b_v1, w_k1, e_v1 = other
        b_s1, b_c1, b_top = _products(b_q, b_k1, b_a, w_k1, o_t, n_left, MASKED)
        b_new, e_n = tl.maximum(b_new, b_top), tl.maximum(e_n, e_v1)
    b_ref = _above(b_new)
    b_r = tl.exp2(_above(b_m) - b_ref)
    b_ref -= 8.807354922057604
    b_p = tl.exp2(b_s * b_c[:, None] - (b_ref - (e_v - e_n))[:, None])
    b_l = b_l * b_r + tl.sum(b_p, 1) * tl.exp2(e_n - e_v)
    if other is not None:
        b_p1 = tl.exp2(b_s1 * b_c1[:, None] - (b_ref - (e_v1 - e_n))[:, None])
        b_l += tl.sum(b_p1, 1) * tl.exp2(e_n - e_v1)
    # [BQ, T] @ [T, DP] -> [BQ, DP]; Hopper sums e4m3 products to 14 bits, so only those of a step
    b_pv = tl.dot(_operand(b_p, BQ, T, b_v.dtype), tl.trans(b_v))
    if other is not None:
        b_pv = tl.dot(_operand(b_p1, BQ, T, b_v.dtype), tl.trans(b_v1), b_pv)
    return b_o * (b_r * tl.exp2(e_o - e_n))[:, None] + b_pv, b_new, b_l, e_n


@triton.jit(do_not_specialize=["n_q", "n_k", "n_pad", "width"])
def _int8_attention_fwd_kernel(
    q, k, v, k_scale, v_exponent, mean, o, lse, indices, counts, kv_len,
    s_q, s_o, n_q, n_k, n_pad, width, scale, d,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, DP: tl.constexpr,
    PADDED: tl.constexpr, STAGES: tl.constexpr, FLOOR: tl.constexpr, STEP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_row = i_bh * tl.num_programs(0) + i_m
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    SPLIT: tl.constexpr = BLOCK_K // TILE
    p_idx = indices + i_row * width
    n_kept = tl.load(counts + i_row)
    n_whole = whole_blocks(p_idx, n_kept, n_valid, BLOCK_K, PADDED)

    o_q, o_d = i_m * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, DP)
    o_t = tl.arange(0, TILE)
    m_q = (o_q < n_q)[:, None] & (o_d < d)[None, :]
    x_q = q + i_b.to(tl.int64) * s_q[0] + i_h.to(tl.int64) * s_q[1]
    p_q = x_q + o_q.to(tl.int64)[:, None] * s_q[2] + o_d[None, :] * s_q[3]
    b_x = tl.load(p_q, mask=m_q, other=0.0).to(tl.float32) * scale
    b_a = tl.maximum(tl.max(tl.abs(b_x), 1), FLOOR) / 127
    b_q = round_int8(b_x * (1.0 / b_a)[:, None])
    if lse is not None:
        b_mean = tl.load(mean + i_bh * d + o_d, mask=o_d < d, other=0.0)
        b_shift = tl.sum(b_x * b_mean[None, :], 1)

    p_scale = k_scale + i_bh * (n_pad // TILE)
    p_exponent = v_exponent + i_bh * (n_pad // TILE)
    i_k, i_v = None, None
    if DESCRIPTORS:
        p_k, p_v, i_k, i_v = k, v, (i_bh * n_pad).to(tl.int32), (i_bh * DP).to(tl.int32)
    else:
        p_k = k + i_bh * n_pad * DP + o_t[:, None] * DP + o_d[None, :]
        p_v = v + i_bh * n_pad * DP + o_d[:, None] * n_pad + o_t[None, :]
    b_o = tl.zeros([BLOCK_Q, DP], tl.float32)
    b_m = tl.full([BLOCK_Q], -1e30, tl.float32)
    b_l = tl.zeros([BLOCK_Q], tl.float32)
    e_o = -1000.0
    n_steps = n_whole * SPLIT // STEP
    for i in tl.range(0, n_steps, num_stages=STAGES):
        i_t = tl.load(p_idx + i * STEP // SPLIT) * SPLIT + i * STEP % SPLIT
        group = _load_group(p_k, p_v, i_k, i_v, p_scale, p_exponent, i_t, TILE, DP)
        other = None
        if STEP == 2:
            i_t = tl.load(p_idx + (i * 2 + 1) // SPLIT) * SPLIT + (i * 2 + 1) % SPLIT
            other = _load_group(p_k, p_v, i_k, i_v, p_scale, p_exponent, i_t, TILE, DP)
        b_o, b_m, b_l, e_o = _absorb(
            group, other, TILE, b_q, b_a, o_t, b_o, b_m, b_l, e_o, BLOCK_Q, TILE, False
        )

    # only a ragged last block, blocks cut by kv_len and the odd group of a pair pay for a mask
    for i in tl.range(n_steps * STEP, n_kept * SPLIT, num_stages=1):
        i_t = tl.load(p_idx + i // SPLIT) * SPLIT + i % SPLIT
        group = _load_group(p_k, p_v, i_k, i_v, p_scale, p_exponent, i_t, TILE, DP)
        n_left = n_valid - i_t * TILE
        b_o, b_m, b_l, e_o = _absorb(
            group, None, n_left, b_q, b_a, o_t, b_o, b_m, b_l, e_o, BLOCK_Q, TILE, True
        )

    # a row without a valid key gives zeros and -inf
    b_full = tl.where(b_l > 0, b_l, 1.0)
    b_r = tl.exp2(e_o) / b_full
    if lse is not None:
        b_ref = _above(b_m) - 8.807354922057604
        b_lse = (b_ref + tl.log2(b_full) + b_shift) * 0.6931471805599453
        b_lse = tl.where(b_l > 0, b_lse, -float("inf"))
        tl.store(lse + i_bh * n_q + o_q, b_lse, mask=o_q < n_q)
    x_o = o + i_b.to(tl.int64) * s_o[0] + i_h.to(tl.int64) * s_o[1]
    p_o = x_o + o_q.to(tl.int64)[:, None] * s_o[2] + o_d[None, :] * s_o[3]
    tl.store(p_o, (b_o * b_r[:, None]).to(o.dtype.element_ty), mask=m_q)


def supports(q: Tensor, *, block_q: int = 64, block_k: int = 64, **_: object) -> str | None:
    """None if this file serves the call, else the reason why not."""
    if min(block_q, block_k) < 32:
        return f"it has blocks of 32, 64 and 128 tokens, not {block_q} and {block_k}"
    return unsupported(q, block_q, block_k)


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    return_lse: bool = False,
    kv_len: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.block_sparse_attention with precision="int8"; the output has the layout of q."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    launch = find("int8", capability_of(q), q.shape[-1], table.block_q)
    keys = quantize(k, v, table.block_k, min(launch.tile, table.block_k), kv_len)
    attend(q, keys, out, lse, table, launch, scale, kv_len)
    return out if lse is None else (out, lse)


def attend(
    q: Tensor,
    keys: Quantized,
    out: Tensor,
    lse: Tensor | None,
    table: BlockTable,
    launch: Launch,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> None:
    """Run the attention kernel: that of Hopper where the launch names it and it serves the call."""
    call = (q, keys, out, lse, table, launch, scale, kv_len)
    if launch.specialized and q.is_cuda:
        from dit_accel.kernels.int8_attention import gluon as hopper

        if hopper.unserved(q, out, table, launch, kv_len) is None:
            return hopper.attend(*call)
        plain = find("int8", capability_of(q), q.shape[-1], table.block_q, specialized=False)
        call = (*call[:5], plain, *call[6:])
    run(_int8_attention_fwd_kernel, *forward(*call))


def forward(
    q: Tensor,
    keys: Quantized,
    out: Tensor,
    lse: Tensor | None,
    table: BlockTable,
    launch: Launch,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the attention kernel."""
    (n_pad, width), d = keys.k.shape[2:], q.shape[-1]
    tile = n_pad // keys.k_scale.shape[2]
    limits = key_limits(keys.k[:, :, : table.n_k], kv_len)
    k, v, (indices, row) = keys.k, keys.v, table_rows(table)
    if launch.descriptors:
        k = TensorDescriptor.from_tensor(k.view(-1, width), [tile, width])
        v = TensorDescriptor.from_tensor(v.view(-1, n_pad), [width, tile])
    arguments = {
        "q": q, "k": k, "v": v, "k_scale": keys.k_scale,
        "v_exponent": keys.v_exponent, "mean": keys.mean, "o": out, "lse": lse,
        "indices": indices, "counts": table.counts.contiguous(), **limits,
        "s_q": q.stride(), "s_o": out.stride(), "n_q": q.shape[2], "n_pad": n_pad,
        "width": row, "scale": log2_scale(scale, q), "d": d,
        "BLOCK_Q": table.block_q, "BLOCK_K": table.block_k, "TILE": tile, "DP": width,
        "DESCRIPTORS": launch.descriptors,
        "STAGES": launch.stages, "FLOOR": FLOOR,
        # tensor cores that read shared memory leave registers for the logits of two groups
        "STEP": 2 if launch.capability in (90, 100) else 1,
    }  # fmt: skip
    return (table.query_blocks, q.shape[1], q.shape[0]), arguments, launch
