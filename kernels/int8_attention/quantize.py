"""Keys to int8 and values to e4m3 on CUDA, in Triton: one pass over k and v.

The queries are quantised by the attention kernel, in registers. A group is the keys of one tile
of that kernel; it has one scale for its keys and one power of two for its values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import capability_of, find, padded, run
from dit_accel.kernels.tiles import key_limits
from dit_accel.table import block_count

# Keys that the mean is taken of, evenly spaced.
SAMPLES = 256
# Smallest magnitude that a scale is made for: an all-zero group has a scale too.
FLOOR = 1e-12
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 1.0}


@dataclass(frozen=True)
class Quantized:
    """Keys and values as the attention kernel reads them.

    Args:
        k: [B, H, M·T, C] int8, (key − mean) / k_scale, zero where there is no valid key; C is D
            as a power of two, T the tile.
        v: [B, H, C, M·T] e4m3 (or the values' own dtype), value / 2^v_exponent; for e4m3 the keys
            of each 16 are in the order of `shuffled`.
        k_scale: [B, H, M] float32.
        v_exponent: [B, H, M] float32, whole numbers.
        mean: [B, H, D] float32, what was subtracted from the keys.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_exponent: Tensor
    mean: Tensor


@triton.jit
def round_int8(b_x):
    """Nearest integer, ties to even, of float32 in ±127: adding 1.5·2²³ leaves no fraction bits."""
    return ((b_x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def shuffled(o_x):
    """Which key is at each place: 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15 of every 16.

    A thread of the tensor cores holds the columns 2t, 2t+1, 2t+8, 2t+9 of a product and multiplies
    the columns 4t … 4t+3 of an 8-bit operand: in this order the weights stay where they are.
    """
    return o_x // 16 * 16 + o_x % 4 // 2 * 8 + o_x % 16 // 4 * 2 + o_x % 2


@triton.jit(do_not_specialize=["n_k"])
def _int8_mean_fwd_kernel(
    k, mean, kv_len, s_k, n_k, d, SAMPLES: tl.constexpr, TILE: tl.constexpr, DP: tl.constexpr
):
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    x_k = k + i_b.to(tl.int64) * s_k[0] + i_h.to(tl.int64) * s_k[1]
    o_d = tl.arange(0, DP)
    step = tl.maximum(n_valid // SAMPLES, 1)
    n_read = tl.minimum(n_valid, SAMPLES)
    b_sum = tl.zeros([TILE, DP], tl.float32)
    for i in range(0, n_read, TILE):
        o_i = i + tl.arange(0, TILE)
        p_k = x_k + (o_i * step).to(tl.int64)[:, None] * s_k[2] + o_d[None, :] * s_k[3]
        mask = (o_i < n_read)[:, None] & (o_d < d)[None, :]
        b_sum += tl.load(p_k, mask=mask, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_sum, 0) / tl.maximum(n_read, 1).to(tl.float32)
    p_mean = mean + (i_b * tl.num_programs(0) + i_h) * d + o_d
    tl.store(p_mean, b_mean, mask=o_d < d)


@triton.jit(do_not_specialize=["n_k"])
def _int8_quantize_fwd_kernel(
    k, v, k8, v8, k_scale, v_exponent, mean, kv_len, s_k, s_v, n_k, d,
    TILE: tl.constexpr, DP: tl.constexpr, LARGEST: tl.constexpr, FLOOR: tl.constexpr,
    SHUFFLED: tl.constexpr,
):  # fmt: skip
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_group = i_bh * tl.num_programs(0) + i_t
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    o_t, o_d = tl.arange(0, TILE), tl.arange(0, DP)
    m_d = (o_d < d)[None, :]

    o_k = i_t * TILE + o_t
    x_k = k + i_b.to(tl.int64) * s_k[0] + i_h.to(tl.int64) * s_k[1]
    p_k = x_k + o_k.to(tl.int64)[:, None] * s_k[2] + o_d[None, :] * s_k[3]
    m_k = (o_k < n_valid)[:, None] & m_d
    b_mean = tl.load(mean + i_bh * d + o_d, mask=o_d < d, other=0.0)
    b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.where(m_k, b_k - b_mean[None, :], 0.0)
    w_k = tl.maximum(tl.max(tl.max(tl.abs(b_k), 1), 0), FLOOR) / 127
    p_k8 = k8 + (i_group * TILE + o_t)[:, None] * DP + o_d[None, :]
    tl.store(p_k8, round_int8(b_k * (1.0 / w_k)))
    tl.store(k_scale + i_group, w_k)

    o_p = o_t
    if SHUFFLED:
        o_p = shuffled(o_t)
    o_v = i_t * TILE + o_p
    x_v = v + i_b.to(tl.int64) * s_v[0] + i_h.to(tl.int64) * s_v[1]
    p_v = x_v + o_v.to(tl.int64)[:, None] * s_v[2] + o_d[None, :] * s_v[3]
    b_v = tl.load(p_v, mask=(o_v < n_valid)[:, None] & m_d, other=0.0).to(tl.float32)
    e_v = tl.ceil(tl.log2(tl.maximum(tl.max(tl.max(tl.abs(b_v), 1), 0), FLOOR) / LARGEST))
    n_pad = tl.num_programs(0) * TILE
    # [TILE, DP] -> [DP, TILE]
    p_v8 = v8 + (i_bh * DP + o_d)[:, None] * n_pad + (i_t * TILE + o_t)[None, :]
    tl.store(p_v8, tl.trans((b_v * tl.exp2(-e_v)).to(v8.dtype.element_ty)))
    tl.store(v_exponent + i_group, e_v)


def value_dtype(v: Tensor) -> torch.dtype:
    """e4m3 where the GPU multiplies it (compute capability 8.9), else the values' own."""
    return torch.float8_e4m3fn if capability_of(v) >= 89 else v.dtype


def key_mean(k: Tensor, kv_len: int | Tensor | None = None) -> Tensor:
    """[B, H, D] float32: the mean of up to 256 evenly spaced valid keys.

    The softmax is the same whatever is subtracted from all keys; the mean makes the rest small.
    """
    batch, heads, n, d = k.shape
    mean = k.new_empty((batch, heads, d), dtype=torch.float32)
    limits = key_limits(k, kv_len)
    limits.pop("PADDED")
    launch = find("int8_mean", capability_of(k), d, 64)
    arguments = {
        "k": k, "mean": mean, **limits, "s_k": k.stride(), "d": d, "SAMPLES": SAMPLES,
        "TILE": launch.tile, "DP": padded(d),
    }  # fmt: skip
    run(_int8_mean_fwd_kernel, (heads, batch), arguments, launch)
    return mean


def quantize(
    k: Tensor,
    v: Tensor,
    block_k: int,
    tile: int,
    kv_len: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Quantized:
    """Keys and values [B, H, N, D] of any strides, in groups of `tile` keys; no host sync.

    Args:
        block_k: keys of a block of the table, a multiple of the tile.
        dtype: of the values, None is `value_dtype(v)`.
    """
    (batch, heads, n, d), dtype = k.shape, dtype or value_dtype(v)
    groups = block_count(n, block_k) * (block_k // tile)
    width = padded(d)
    k8 = k.new_empty((batch, heads, groups * tile, width), dtype=torch.int8)
    v8 = v.new_empty((batch, heads, width, groups * tile), dtype=dtype)
    scales = (k.new_empty((batch, heads, groups), dtype=torch.float32) for _ in range(2))
    out = Quantized(k8, v8, *scales, key_mean(k, kv_len))
    launch = find("int8_quantize", capability_of(k), d, tile)
    run(
        _int8_quantize_fwd_kernel,
        (groups, heads, batch),
        quantize_arguments(k, v, out, kv_len),
        launch,
    )
    return out


def quantize_arguments(
    k: Tensor, v: Tensor, out: Quantized, kv_len: int | Tensor | None = None
) -> dict[str, object]:
    """The arguments of the quantising kernel, which fills `out`."""
    limits = key_limits(k, kv_len)
    limits.pop("PADDED")
    return {
        "k": k, "v": v, "k8": out.k, "v8": out.v, "k_scale": out.k_scale,
        "v_exponent": out.v_exponent,
        "mean": out.mean, **limits, "s_k": k.stride(), "s_v": v.stride(), "d": k.shape[-1],
        "TILE": out.k.shape[2] // out.k_scale.shape[2], "DP": out.k.shape[3],
        "LARGEST": LARGEST[out.v.dtype], "FLOOR": FLOOR, "SHUFFLED": out.v.element_size() == 1,
    }  # fmt: skip
