"""The linear branch on CUDA, in Triton: a kernel for the state, one that adds it to O_sparse.

    H = Σ φ(k_j)ᵀ v_j,  Z = Σ φ(k_j)              fp32, summed over the splits of the keys
    O_i = base_i + (φ(q_i) H − Σ a_ij v_j) Wᵀ / (φ(q_i)·Z − Σ a_ij + ε) + b,  Σ over the excluded j

With nothing excluded the means H̄Wᵀ = HWᵀ/n and Z̄ = Z/n are formed once and every product runs in
the dtype of q; ε becomes ε/n. The excluded blocks are taken off in float32 and in their quadratic
form a_ij = φ(q_i)·φ(k_j): no state of a single block is ever stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.triton import block_sparse_attention
from dit_accel.kernels.launch import Launch, capability_of, find, padded, run, unsupported
from dit_accel.kernels.sparse_linear_attention.features import EPS, FEATURE_MAPS
from dit_accel.kernels.tiles import key_limits
from dit_accel.table import BlockTable, block_count

# Programs that fill the GPU: the keys of a head are split so that about this many run.
_PROGRAMS = 256
_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def _features(x, o_x, n_x, stride_n, stride_d, d, BLOCK_D: tl.constexpr, PHI: tl.constexpr):
    """φ of the rows `o_x` of x in fp32 [T, BLOCK_D], zero at or beyond row n_x and column d."""
    o_d = tl.arange(0, BLOCK_D)
    m_x = (o_x[:, None] < n_x) & (o_d[None, :] < d)
    p_x = x + o_x.to(tl.int64)[:, None] * stride_n + o_d[None, :] * stride_d
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    if PHI == 0:
        b_x = tl.where(o_d[None, :] < d, b_x, -float("inf"))
        b_x = tl.exp(b_x - tl.max(b_x, 1)[:, None])
        b_x = b_x / tl.sum(b_x, 1)[:, None]
    elif PHI == 1:
        b_x = tl.where(b_x > 0, b_x + 1.0, tl.exp(tl.minimum(b_x, 0.0)))
    else:
        b_x = tl.maximum(b_x, 0.0)
    return tl.where(m_x, b_x, 0.0)


@triton.jit
def _rows(x, o_x, n_x, stride_n, stride_d, d, BLOCK_D: tl.constexpr):
    """The rows `o_x` of x in fp32 [T, BLOCK_D], zero at or beyond row n_x and column d."""
    o_d = tl.arange(0, BLOCK_D)
    m_x = (o_x[:, None] < n_x) & (o_d[None, :] < d)
    p_x = x + o_x.to(tl.int64)[:, None] * stride_n + o_d[None, :] * stride_d
    return tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_k", "n_split"])
def _linear_state_fwd_kernel(
    k, v, state, total, kv_len, s_k, s_v, n_k, n_split, d,
    TILE_K: tl.constexpr, BLOCK_D: tl.constexpr, PHI: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_out = (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * n_split + i_s
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    x_k = k + i_b.to(tl.int64) * s_k[0] + i_h.to(tl.int64) * s_k[1]
    x_v = v + i_b.to(tl.int64) * s_v[0] + i_h.to(tl.int64) * s_v[1]
    b_h = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    b_z = tl.zeros([BLOCK_D], tl.float32)
    for i in range(i_s, tl.cdiv(n_valid, TILE_K), n_split):
        o_k = i * TILE_K + tl.arange(0, TILE_K)
        b_k = _features(x_k, o_k, n_valid, s_k[2], s_k[3], d, BLOCK_D, PHI)
        b_v = _rows(x_v, o_k, n_valid, s_v[2], s_v[3], d, BLOCK_D).to(DTYPE)
        # [BD, TK] @ [TK, BD] -> [BD, BD]
        b_h = tl.dot(tl.trans(b_k.to(DTYPE)), b_v, b_h, input_precision=PRECISION)
        b_z += tl.sum(b_k, 0)
    o_d = tl.arange(0, BLOCK_D)
    p_h = state + i_out * d * d + o_d[:, None] * d + o_d[None, :]
    tl.store(p_h, b_h, mask=(o_d[:, None] < d) & (o_d[None, :] < d))
    tl.store(total + i_out * d + o_d, b_z, mask=o_d < d)


@triton.jit(do_not_specialize=["n_q", "n_k"])
def _linear_all_fwd_kernel(
    base, q, o, state, total, bias, kv_len, s_c, s_q, s_o, n_q, n_k, d, eps,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, PHI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    o_q, o_d = i_m * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    x_q = q + i_b.to(tl.int64) * s_q[0] + i_h.to(tl.int64) * s_q[1]
    b_q = _features(x_q, o_q, n_q, s_q[2], s_q[3], d, BLOCK_D, PHI)
    b_z = tl.load(total + i_bh * d + o_d, mask=o_d < d, other=0.0)
    b_q = b_q / (tl.sum(b_q * b_z[None, :], 1) + eps / tl.maximum(n_valid, 1))[:, None]
    m_d = o_d < d
    p_h = state + i_bh * d * d + o_d[:, None] * d + o_d[None, :]
    b_h = tl.load(p_h, mask=m_d[:, None] & m_d[None, :], other=0.0)
    x_c = base + i_b.to(tl.int64) * s_c[0] + i_h.to(tl.int64) * s_c[1]
    b_o = _rows(x_c, o_q, n_q, s_c[2], s_c[3], d, BLOCK_D)
    # [BQ, BD] @ [BD, BD] -> [BQ, BD]
    b_o = tl.dot(b_q.to(b_h.dtype), b_h, b_o, input_precision=PRECISION)
    if bias is not None:
        b_o += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    x_o = o + i_b.to(tl.int64) * s_o[0] + i_h.to(tl.int64) * s_o[1]
    p_o = x_o + o_q.to(tl.int64)[:, None] * s_o[2] + o_d[None, :] * s_o[3]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=(o_q[:, None] < n_q) & m_d[None, :])


@triton.jit(do_not_specialize=["n_q", "n_k", "width"])
def _linear_rest_fwd_kernel(
    base, q, k, v, o, state, total, weight, bias, indices, counts, kv_len,
    s_c, s_q, s_k, s_v, s_o, n_q, n_k, width, d, eps,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PHI: tl.constexpr, PRECISION: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    o_q, o_d = i_m * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    x_q = q + i_b.to(tl.int64) * s_q[0] + i_h.to(tl.int64) * s_q[1]
    b_q = _features(x_q, o_q, n_q, s_q[2], s_q[3], d, BLOCK_D, PHI)
    b_o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    b_n = tl.zeros([BLOCK_Q], tl.float32)
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    i_row = i_bh * tl.num_programs(0) + i_m
    x_k = k + i_b.to(tl.int64) * s_k[0] + i_h.to(tl.int64) * s_k[1]
    x_v = v + i_b.to(tl.int64) * s_v[0] + i_h.to(tl.int64) * s_v[1]
    n_left = n_valid
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    for i in range(0, tl.load(counts + i_row) * SPLIT):
        i_k = tl.load(indices + i_row * width + i // SPLIT) * BLOCK_K + i % SPLIT * TILE_K
        o_k = i_k + tl.arange(0, TILE_K)
        b_k = _features(x_k, o_k, n_valid, s_k[2], s_k[3], d, BLOCK_D, PHI)
        b_v = _rows(x_v, o_k, n_valid, s_v[2], s_v[3], d, BLOCK_D)
        # [BQ, BD] @ [BD, TK] -> [BQ, TK]
        b_a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        # [BQ, TK] @ [TK, BD] -> [BQ, BD]
        b_o -= tl.dot(b_a, b_v, input_precision=PRECISION)
        b_n -= tl.sum(b_a, 1)
        n_left -= tl.minimum(tl.maximum(n_valid - i_k, 0), TILE_K)
    b_z = tl.load(total + i_bh * d + o_d, mask=o_d < d, other=0.0)
    b_n = tl.maximum(b_n + tl.sum(b_q * b_z[None, :], 1), 0.0)
    b_h = _rows(state + i_bh * d * d, o_d, d, d, 1, d, BLOCK_D)
    # [BQ, BD] @ [BD, BD] -> [BQ, BD]
    b_o = tl.dot(b_q, b_h, b_o, input_precision=PRECISION)
    # what is left of a sum of which everything was taken off is rounding
    b_o = tl.where(n_left > 0, b_o, 0.0)
    b_o = b_o / (b_n + eps)[:, None]
    b_w = _rows(weight, o_d, d, d, 1, d, BLOCK_D)
    # [BQ, BD] @ [BD, BD] -> [BQ, BD]
    b_o = tl.dot(b_o, tl.trans(b_w), input_precision=PRECISION)
    if bias is not None:
        b_o += tl.load(bias + o_d, mask=o_d < d, other=0.0).to(tl.float32)[None, :]
    x_c = base + i_b.to(tl.int64) * s_c[0] + i_h.to(tl.int64) * s_c[1]
    b_o += _rows(x_c, o_q, n_q, s_c[2], s_c[3], d, BLOCK_D)
    x_o = o + i_b.to(tl.int64) * s_o[0] + i_h.to(tl.int64) * s_o[1]
    p_o = x_o + o_q.to(tl.int64)[:, None] * s_o[2] + o_d[None, :] * s_o[3]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=(o_q[:, None] < n_q) & (o_d[None, :] < d))


def supports(q: Tensor, *, block_q: int = 64, block_k: int = 64, **_: object) -> str | None:
    """None if this file serves the call, else the reason why not."""
    return unsupported(q, block_q, block_k)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    feature_map: str = "softmax",
    excluded: BlockTable | None = None,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """See ops.sparse_linear_attention; `excluded` as in `linear_branch`."""
    base = block_sparse_attention(q, k, v, table, scale, kv_len=kv_len)
    if weight is None:
        return base
    return linear_branch(base, q, k, v, excluded, weight, bias, feature_map, kv_len)


def linear_branch(
    base: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    excluded: BlockTable | None,
    weight: Tensor,
    bias: Tensor | None = None,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """base plus the projected linear attention over all key blocks but `excluded`'s (None: all)."""
    batch, heads, _, d = q.shape
    # subtraction needs float32; without one the dtype of q is enough
    dtype = q.dtype if excluded is None else torch.float32
    launch = find("state" if excluded is None else "state32", capability_of(q), d, 64)
    tiles = block_count(k.shape[2], launch.tile)
    splits = max(1, min(tiles, _PROGRAMS // (batch * heads)))
    state = q.new_empty((batch, heads, splits, d, d), dtype=torch.float32)
    total = q.new_empty((batch, heads, splits, d), dtype=torch.float32)
    case = state_case(k, v, state, total, launch, dtype, feature_map, kv_len)
    run(_linear_state_fwd_kernel, *case)
    state, total, weight = state.sum(2), total.sum(2), weight.float().contiguous()
    out = torch.empty_like(q)
    tensors = {"base": base, "q": q, "o": out, "bias": None if bias is None else bias.contiguous()}
    if excluded is None:
        n = k.shape[2] if kv_len is None else kv_len
        n = n.clamp(1, k.shape[2]).view(-1, 1, 1, 1) if isinstance(n, Tensor) else max(1, n)
        tensors |= {"state": (state @ weight.mT / n).to(dtype), "total": (total[..., None] / n)}
        launch = find("linear_all", capability_of(q), d, 64)
        run(_linear_all_fwd_kernel, *all_case(tensors, k, launch, feature_map, kv_len))
        return out
    tensors |= {"k": k, "v": v, "state": state, "total": total, "weight": weight}
    launch = find("linear_rest", capability_of(q), d, excluded.block_q)
    run(_linear_rest_fwd_kernel, *rest_case(tensors, excluded, launch, feature_map, kv_len))
    return out


def state_case(
    k: Tensor,
    v: Tensor,
    state: Tensor,
    total: Tensor,
    launch: Launch,
    dtype: torch.dtype,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
) -> tuple[tuple[int, ...], dict[str, Any], Launch]:
    """Grid, arguments and launch of the state kernel, whose products run in `dtype`."""
    batch, heads, splits, d = total.shape
    arguments = {
        "k": k, "v": v, "state": state, "total": total, **key_limits(k, kv_len), "s_k": k.stride(),
        "s_v": v.stride(), "n_split": splits, "d": d, "TILE_K": launch.tile,
        "BLOCK_D": padded(d), "PHI": FEATURE_MAPS.index(feature_map),
        "PRECISION": launch.precision, "DTYPE": _DTYPES[dtype],
    }  # fmt: skip
    return (splits, heads, batch), arguments, launch


def all_case(
    tensors: dict[str, Tensor | None],
    k: Tensor,
    launch: Launch,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
) -> tuple[tuple[int, ...], dict[str, Any], Launch]:
    """Grid, arguments and launch of the kernel that excludes no block."""
    q, limits = tensors["q"], key_limits(k, kv_len)
    limits.pop("PADDED")
    names = {"s_c": "base", "s_q": "q", "s_o": "o"}
    arguments = {
        **tensors, **limits, **{stride: tensors[name].stride() for stride, name in names.items()},
        "n_q": q.shape[2], "d": q.shape[3], "eps": EPS, "BLOCK_Q": launch.tile,
        "BLOCK_D": padded(q.shape[3]), "PHI": FEATURE_MAPS.index(feature_map),
        "PRECISION": launch.precision,
    }  # fmt: skip
    return (block_count(q.shape[2], launch.tile), q.shape[1], q.shape[0]), arguments, launch


def rest_case(
    tensors: dict[str, Tensor | None],
    excluded: BlockTable,
    launch: Launch,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
) -> tuple[tuple[int, ...], dict[str, Any], Launch]:
    """Grid, arguments and launch of the kernel that leaves out the blocks of `excluded`."""
    names = {"s_c": "base", "s_q": "q", "s_k": "k", "s_v": "v", "s_o": "o"}
    q, indices = tensors["q"], excluded.indices
    arguments = {
        **tensors, "indices": indices.contiguous(), "counts": excluded.counts.contiguous(),
        "width": indices.shape[-1], **key_limits(tensors["k"], kv_len),
        **{stride: tensors[name].stride() for stride, name in names.items()},
        "n_q": q.shape[2], "d": q.shape[3], "eps": EPS, "BLOCK_Q": excluded.block_q,
        "BLOCK_K": excluded.block_k, "TILE_K": min(launch.tile, excluded.block_k),
        "BLOCK_D": padded(q.shape[3]), "PHI": FEATURE_MAPS.index(feature_map),
        "PRECISION": launch.precision,
    }  # fmt: skip
    return (block_count(q.shape[2], excluded.block_q), q.shape[1], q.shape[0]), arguments, launch
