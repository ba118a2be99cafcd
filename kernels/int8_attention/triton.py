"""Block-sparse attention in eight bits on CUDA, in Triton: int8 q·kᵀ, e4m3 weights and values.

    s_ij = a_i b_J · q8_i·k8_j + scale·q_i·k̄,   O_i = Σ_J c_J Σ_{j∈J} P8_ij v8_j / Σ_j P_ij

a is a scale per query, b and c one per group J of keys (a tile), k̄ what was subtracted from the
keys: the same for all keys of a query, it only enters LSE. See README.md beside this file.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.kernels.int8_attention.quantize import FLOOR, Quantized, quantize, round_int8
from dit_accel.kernels.launch import Launch, capability_of, find, run, unsupported
from dit_accel.kernels.tiles import key_limits, log2_scale, whole_blocks
from dit_accel.table import BlockTable

__all__ = ["int8_attention", "supports"]


@triton.jit
def _load_group(desc_k, desc_v, p_k, p_v, k_scale, v_scale, i_bh, i_t, n_pad,
                TILE: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """Keys [TILE, DP] and values [DP, TILE] of a group, and their scales."""
    if desc_k is not None:
        b_k = desc_k.load([(i_bh * n_pad + i_t * TILE).to(tl.int32), 0])
        b_v = desc_v.load([(i_bh * DP).to(tl.int32), i_t * TILE])
    else:
        b_k = tl.load(p_k + (i_bh * n_pad + i_t * TILE) * DP)
        b_v = tl.load(p_v + i_bh * n_pad * DP + i_t * TILE)
    i_group = i_bh * (n_pad // TILE) + i_t
    return b_k, b_v, tl.load(k_scale + i_group), tl.load(v_scale + i_group)


@triton.jit
def _above(b_m):
    """m, rounded up: no weight exceeds 448, though s·c is subtracted from m without rounding."""
    return b_m + tl.abs(b_m) * 1.1920928955078125e-07


@triton.jit
def _absorb(b_s, b_v, b_c, w_v, w_o, b_o, b_m, b_l,
            BQ: tl.constexpr, T: tl.constexpr, SHUFFLED: tl.constexpr):  # fmt: skip
    """One step of the online softmax: int8 products b_s [BQ, T] as float32, scale b_c [BQ] to log2.

    Weights are 448·2^(x − m): e4m3 ends at 448. b_o is in units of w_o, the last value scale.
    """
    # an integer step of 8 tells any two products apart, and keeps m below 2^24
    b_c = tl.minimum(b_c, 8.0)
    b_new = tl.maximum(b_m, tl.max(b_s, 1) * b_c)
    b_ref, b_old = _above(b_new), _above(b_m)
    b_p = tl.exp2(b_s * b_c[:, None] - (b_ref - 8.807354922057604)[:, None])
    b_a = tl.exp2(b_old - b_ref)
    b_l = b_l * b_a + tl.sum(b_p, 1)
    if SHUFFLED:
        # the order of quantize.shuffled
        b_p = b_p.reshape([BQ, T // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4).reshape([BQ, T])
    # [BQ, T] @ [T, DP] -> [BQ, DP]; Hopper sums 8-bit products to 14 bits, so only those of a tile
    b_pv = tl.dot(b_p.to(b_v.dtype), tl.trans(b_v), max_num_imprecise_acc=T if SHUFFLED else 0)
    return b_o * (b_a * (w_o / w_v))[:, None] + b_pv, b_new, b_l, w_v


@triton.jit(do_not_specialize=["n_q", "n_k", "n_pad", "width"])
def _int8_attention_fwd_kernel(
    q, k, v, desc_k, desc_v, k_scale, v_scale, mean, o, lse, indices, counts, kv_len,
    s_q, s_o, n_q, n_k, n_pad, width, scale, d,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, DP: tl.constexpr,
    PADDED: tl.constexpr, STAGES: tl.constexpr, FLOOR: tl.constexpr, SHUFFLED: tl.constexpr,
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

    p_k = k + o_t[:, None] * DP + o_d[None, :]
    p_v = v + o_d[:, None] * n_pad + o_t[None, :]
    b_o = tl.zeros([BLOCK_Q, DP], tl.float32)
    b_m = tl.full([BLOCK_Q], -1e30, tl.float32)
    b_l = tl.zeros([BLOCK_Q], tl.float32)
    w_o = 1.0
    for i in tl.range(0, n_whole * SPLIT, num_stages=STAGES):
        i_t = tl.load(p_idx + i // SPLIT) * SPLIT + i % SPLIT
        b_k, b_v, w_k, w_v = _load_group(
            desc_k, desc_v, p_k, p_v, k_scale, v_scale, i_bh, i_t, n_pad, TILE, DP
        )
        # [BQ, DP] @ [DP, T] -> [BQ, T]
        b_s = tl.dot(b_q, tl.trans(b_k), out_dtype=tl.int32).to(tl.float32)
        b_o, b_m, b_l, w_o = _absorb(
            b_s, b_v, b_a * w_k, w_v, w_o, b_o, b_m, b_l, BLOCK_Q, TILE, SHUFFLED
        )

    # only the ragged last block, and blocks cut by kv_len, pay for a mask
    for i in tl.range(n_whole * SPLIT, n_kept * SPLIT, num_stages=1):
        i_t = tl.load(p_idx + i // SPLIT) * SPLIT + i % SPLIT
        b_k, b_v, w_k, w_v = _load_group(
            desc_k, desc_v, p_k, p_v, k_scale, v_scale, i_bh, i_t, n_pad, TILE, DP
        )
        b_s = tl.dot(b_q, tl.trans(b_k), out_dtype=tl.int32).to(tl.float32)
        b_s = tl.where((i_t * TILE + o_t)[None, :] < n_valid, b_s, -float("inf"))
        b_o, b_m, b_l, w_o = _absorb(
            b_s, b_v, b_a * w_k, w_v, w_o, b_o, b_m, b_l, BLOCK_Q, TILE, SHUFFLED
        )

    # a row without a valid key gives zeros and -inf
    b_full = tl.where(b_l > 0, b_l, 1.0)
    b_r = w_o / b_full
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
    run(_int8_attention_fwd_kernel, *forward(q, keys, out, lse, table, launch, scale, kv_len))
    return out if lse is None else (out, lse)


def forward(
    q: Tensor,
    keys: Quantized,
    out: Tensor,
    lse: Tensor | None,
    table: BlockTable,
    launch: Launch,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> tuple[tuple[int, ...], dict[str, Any], Launch]:
    """Grid, arguments and launch of the attention kernel."""
    (n_pad, width), d = keys.k.shape[2:], q.shape[-1]
    tile = n_pad // keys.k_scale.shape[2]
    limits = key_limits(keys.k[:, :, : table.n_k], kv_len)
    boxes = {"desc_k": None, "desc_v": None}
    if launch.descriptors:
        boxes["desc_k"] = TensorDescriptor.from_tensor(keys.k.view(-1, width), [tile, width])
        boxes["desc_v"] = TensorDescriptor.from_tensor(keys.v.view(-1, n_pad), [width, tile])
    arguments = {
        "q": q, "k": keys.k, "v": keys.v, **boxes, "k_scale": keys.k_scale,
        "v_scale": keys.v_scale, "mean": keys.mean, "o": out, "lse": lse,
        "indices": table.indices.contiguous(), "counts": table.counts.contiguous(), **limits,
        "s_q": q.stride(), "s_o": out.stride(), "n_q": q.shape[2], "n_pad": n_pad,
        "width": table.indices.shape[-1], "scale": log2_scale(scale, q), "d": d,
        "BLOCK_Q": table.block_q, "BLOCK_K": table.block_k, "TILE": tile, "DP": width,
        "STAGES": launch.stages, "FLOOR": FLOOR, "SHUFFLED": keys.v.element_size() == 1,
    }  # fmt: skip
    return (table.query_blocks, q.shape[1], q.shape[0]), arguments, launch
