"""States of linear attention in Triton: one for each span of keys, summed as a product.

    h_m = φ(K_m)ᵀ (V_m − c) Wᵀ,  z_m = Σ_{j∈m} φ(k_j)         fp32, then stored side by side
    H_n = Σ_m held_nm h_m,  Z_n = Σ_m held_nm z_m              the product of a 0/1 matrix with them

A state of all keys is the sum over some 264 spans. Where each row holds its own blocks, a span is a
block, and the heads go through in parts whose states fit a fixed memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import Launch, capability_of, find, padded, run
from dit_accel.kernels.sparse_linear_attention.features import EPS, FEATURE_MAPS
from dit_accel.kernels.tiles import key_limits
from dit_accel.table import BlockTable, block_count

# Programs that fill the GPU: the tokens of a head are split so that about this many run.
_PROGRAMS = 264
# Bytes of the states of a part of the heads: about what an L2 cache holds, or this share of k, 1/15
# of q, k and v together, which fewer launches are worth; more if one head's are.
_MEMORY = 2**26
_SHARE = 1 / 5


@triton.jit
def _inside(o_x, n_x, d: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask of the rows `o_x` before row n_x and of the columns before d, if there are others."""
    m_x = o_x[:, None] < n_x
    if d < BLOCK_D:
        m_x = m_x & (tl.arange(0, BLOCK_D)[None, :] < d)
    return m_x


@triton.jit
def load_rows(x, o_x, n_x, stride_n, stride_d, d: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows `o_x` of x [T, BLOCK_D], zero at or beyond row n_x and column d."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + o_x.to(tl.int64)[:, None] * stride_n + o_d[None, :] * stride_d
    return tl.load(p_x, mask=_inside(o_x, n_x, d, BLOCK_D), other=0.0)


@triton.jit
def store_rows(x, b_x, o_x, n_x, stride_n, stride_d, d: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `load_rows`, in the dtype of x."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + o_x.to(tl.int64)[:, None] * stride_n + o_d[None, :] * stride_d
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=_inside(o_x, n_x, d, BLOCK_D))


@triton.jit
def features(b_x, o_x, n_x, d: tl.constexpr, BLOCK_D: tl.constexpr, PHI: tl.constexpr):
    """φ in fp32 of what `load_rows` gives, zero where that is outside."""
    b_x = b_x.to(tl.float32)
    if PHI == 0:
        if d < BLOCK_D:
            b_x = tl.where(tl.arange(0, BLOCK_D)[None, :] < d, b_x, -float("inf"))
        b_x = tl.exp(b_x - tl.max(b_x, 1)[:, None])
        b_x = b_x * tl.where(o_x < n_x, 1.0 / tl.sum(b_x, 1), 0.0)[:, None]
    elif PHI == 1:
        b_x = tl.where(b_x > 0, b_x + 1.0, tl.exp(tl.minimum(b_x, 0.0)))
        b_x = tl.where(_inside(o_x, n_x, d, BLOCK_D), b_x, 0.0)
    elif PHI == 2:
        b_x = tl.maximum(b_x, 0.0)
    return b_x


@triton.jit
def finite(b_x, DTYPE: tl.constexpr):
    """b_x inside float16's range: 1/ε, of a row whose features no key has, is beyond it."""
    if DTYPE == tl.float16:  # noqa: SIM300
        b_x = tl.clamp(b_x, -65504.0, 65504.0)
    return b_x


@triton.jit(do_not_specialize=["n_k", "n_span"])
def _linear_state_fwd_kernel(
    k, v, center, weight, ratio, delta, state, total, kv_len,
    s_k, s_v, s_h, s_z, n_k, n_span, d: tl.constexpr, scale,
    TILE_K: tl.constexpr, BLOCK_D: tl.constexpr, PHI: tl.constexpr, PRECISION: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_out = i_bh * tl.num_programs(0) + i_s
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    o_d = tl.arange(0, BLOCK_D)
    x_k = k + i_b.to(tl.int64) * s_k[0] + i_h.to(tl.int64) * s_k[1]
    x_v = v + i_b.to(tl.int64) * s_v[0] + i_h.to(tl.int64) * s_v[1]
    b_h = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    # a sum over the rows that all warps hold is 16 equal rows of a product with ones
    b_one = tl.full([16, TILE_K], 1.0, v.dtype.element_ty)
    b_s = tl.zeros([16 if ratio is None else TILE_K, BLOCK_D], tl.float32)
    if center is not None:
        b_c = tl.load(center + i_bh * d + o_d, mask=o_d < d, other=0.0)
    for i_k in range(i_s * n_span, tl.minimum((i_s + 1) * n_span, n_valid), TILE_K):
        o_k = i_k + tl.arange(0, TILE_K)
        b_k = load_rows(x_k, o_k, n_valid, s_k[2], s_k[3], d, BLOCK_D)
        b_k = features(b_k, o_k, n_valid, d, BLOCK_D, PHI)
        b_v = load_rows(x_v, o_k, n_valid, s_v[2], s_v[3], d, BLOCK_D)
        if center is not None and b_v.dtype == tl.float32:
            b_v -= b_c[None, :]
        if ratio is not None:
            p_r = i_bh * n_k + o_k
            b_k *= tl.load(ratio + p_r, mask=o_k < n_k, other=0.0)[:, None]
            b_s += b_k * tl.load(delta + p_r, mask=o_k < n_k, other=0.0)[:, None]
        # [BD, TK] @ [TK, BD] -> [BD, BD]
        b_k = finite(b_k, b_v.dtype).to(b_v.dtype)
        b_h = tl.dot(tl.trans(b_k), b_v, b_h, input_precision=PRECISION)
        if ratio is None:
            # [16, TK] @ [TK, BD] -> [16, BD]
            b_s = tl.dot(b_one, b_k, b_s, input_precision=PRECISION)
    b_z = tl.max(b_s, 0) if ratio is None else tl.sum(b_s, 0)
    if center is not None and v.dtype.element_ty != tl.float32:
        # 16-bit v - c would be rounded, by the same for all v of a size
        b_h -= b_z[:, None] * b_c[None, :]
    b_h *= scale
    if weight is not None:
        b_w = load_rows(weight, o_d, d, d, 1, d, BLOCK_D)
        # [BD, BD] @ [BD, BD] -> [BD, BD]
        b_h = tl.dot(b_h.to(b_w.dtype), tl.trans(b_w), input_precision=PRECISION)
    b_h = finite(b_h, state.dtype.element_ty)
    store_rows(state + i_out * s_h, b_h, o_d, d, d, 1, d, BLOCK_D)
    b_z = finite(b_z * scale, total.dtype.element_ty).to(total.dtype.element_ty)
    tl.store(total + i_out * s_z + o_d, b_z, mask=o_d < d)


@triton.jit(do_not_specialize=["n_spans"])
def _linear_project_fwd_kernel(
    states, totals, weight, state, total, n_spans, d: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_r, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    o_r, o_d = i_r * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    b_h = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_z = tl.zeros([ROWS], tl.float32)
    for i in tl.range(0, n_spans, loop_unroll_factor=8):  # eight loads at a time
        i_s = i_bh * n_spans + i
        b_h += load_rows(states + i_s * d * d, o_r, d, d, 1, d, BLOCK_D)
        b_z += tl.load(totals + i_s * d + o_r, mask=o_r < d, other=0.0)
    b_w = load_rows(weight, o_d, d, d, 1, d, BLOCK_D).to(tl.float32)
    # [ROWS, BD] @ [BD, BD] -> [ROWS, BD]
    b_h = tl.dot(b_h, tl.trans(b_w), input_precision=PRECISION)
    b_h = finite(b_h, state.dtype.element_ty)
    store_rows(state + i_bh * d * d, b_h, o_r, d, d, 1, d, BLOCK_D)
    tl.store(total + i_bh * d + o_r, b_z, mask=o_r < d)


def state_case(
    k: Tensor,
    v: Tensor,
    state: Tensor,
    total: Tensor,
    span: int,
    launch: Launch,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
    center: Tensor | None = None,
    weight: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the state kernel.

    state [B, H, S, D·D] and total [B, H, S, D]: of S spans of `span` keys, times scale; center
    [B, H, D] float32 is subtracted from v, weight [D, D] in the dtype of v. "identity" is φ(x) = x.
    With factors r, δ [B, H, N] float32 they are Σ r_j φ(k_j)ᵀ v_j and Σ δ_j r_j φ(k_j).
    """
    batch, heads, spans, d = total.shape
    ratio, delta = factors or (None, None)
    arguments = {
        "k": k, "v": v, "center": center, "weight": weight, "state": state, "total": total,
        "ratio": ratio, "delta": delta,
        **key_limits(k, kv_len), "s_k": k.stride(), "s_v": v.stride(), "s_h": state.stride(2),
        "s_z": total.stride(2), "n_span": span, "d": d, "scale": scale,
        "TILE_K": min(launch.tile, span), "BLOCK_D": padded(d), "PHI": feature_index(feature_map),
        "PRECISION": launch.precision,
    }  # fmt: skip
    return (spans, heads, batch), arguments, launch


def feature_index(feature_map: str) -> int:
    """The number of a feature map in the kernels; "identity" is the one after all of them."""
    return (*FEATURE_MAPS, "identity").index(feature_map)


def split(n: int, heads: int, tile: int) -> tuple[int, int]:
    """How many spans of how many tokens, so that the programs of all heads fill the GPU."""
    tiles = block_count(n, tile)
    span = block_count(tiles, max(1, min(tiles, _PROGRAMS // heads)))
    return block_count(tiles, span), span * tile


def span_states(
    k: Tensor,
    v: Tensor,
    feature_map: str,
    kv_len: int | Tensor | None = None,
    center: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Σ φ(k_j)ᵀ (v_j − center) [B, H, S, D, D] and Σ φ(k_j) [B, H, S, D] over each of S spans of
    the keys, float32; factors and scale as in `state_case`."""
    batch, heads, n, d = k.shape
    launch = find("state", capability_of(k), d, 64)
    spans, span = split(n, batch * heads, launch.tile)
    state = k.new_empty((batch, heads, spans, d, d), dtype=torch.float32)
    total = k.new_empty((batch, heads, spans, d), dtype=torch.float32)
    options = (feature_map, kv_len, center, None, factors, scale)
    case = state_case(k, v, state, total, span, launch, *options)
    run(_linear_state_fwd_kernel, *case)
    return state, total


def whole_state(*keys: object, **options: object) -> tuple[Tensor, Tensor]:
    """The sums over all keys, [B, H, D, D] and [B, H, D]; arguments of `span_states`."""
    state, total = span_states(*keys, **options)
    return state.sum(2), total.sum(2)


def project(
    states: Tensor, totals: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Σ_s states_s Wᵀ [B, H, D, D] in dtype and Σ_s totals_s [B, H, D] float32, of `span_states`
    and a weight [D, D]."""
    batch, heads, spans, d = totals.shape
    state = states.new_empty((batch, heads, d, d), dtype=dtype)
    total = totals.new_empty((batch, heads, d))
    launch = find("project", capability_of(states), d, 64)
    arguments = {
        "states": states, "totals": totals, "weight": weight.contiguous(), "state": state,
        "total": total, "n_spans": spans, "d": d, "ROWS": launch.tile, "BLOCK_D": padded(d),
        "PRECISION": launch.precision if states.is_cuda else "ieee",
    }  # fmt: skip
    run(_linear_project_fwd_kernel, (block_count(d, launch.tile), heads, batch), arguments, launch)
    return state, total


def mean_state(
    state: Tensor, total: Tensor, k: Tensor, kv_len: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """State and total over the number n of valid keys, and 1/n [B, H, 1]."""
    n = k.shape[2] if kv_len is None else kv_len
    if isinstance(n, Tensor):
        share = (1 / n.clamp(1, k.shape[2])).view(-1, 1, 1).expand(*k.shape[:2], 1).contiguous()
        return state * share[..., None], total * share, share
    share = 1 / max(1, min(n, k.shape[2]))
    return state * share, total * share, total.new_full((*k.shape[:2], 1), share)


class Part(NamedTuple):
    """Some heads: `held` [B, h, Mq, M] is 1/(number of blocks held) where row n holds block m,
    else 0, in the dtype of k; `eps` [B, h, Mq] is ε in the units of held times a block's mean."""

    heads: slice
    held: Tensor
    eps: Tensor


def parts(k: Tensor, excluded: BlockTable) -> Iterator[Part]:
    """Parts of the heads, each with what its rows hold; the states of a part fit the memory."""
    batch, heads, _, d = k.shape
    # cuBLAS wants rows of whole 16 bytes; the blocks beyond the last are empty
    blocks = block_count(excluded.key_blocks, 8) * 8
    one = batch * (blocks + excluded.query_blocks) * d * (d + 1) * k.element_size()
    memory = max(_MEMORY, int(_SHARE * k.numel() * k.element_size()))
    size = block_count(heads, block_count(heads, max(1, memory // one)))
    mask = torch.nn.functional.pad(excluded.to_mask(), (0, blocks - excluded.key_blocks))
    share = (1 / (excluded.key_blocks - excluded.counts).clamp(min=1)).to(k.dtype)
    eps = share.float() * (EPS / excluded.block_k)
    zero = share.new_zeros(())
    for first in range(0, heads, size):
        here = slice(first, first + size)
        held = torch.where(mask[:, here], zero, share[:, here, :, None])
        yield Part(here, held, eps[:, here].contiguous())


def block_states(
    k: Tensor,
    v: Tensor,
    block: int,
    blocks: int,
    feature_map: str,
    kv_len: int | Tensor | None = None,
    center: Tensor | None = None,
    weight: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[B, H, blocks, D·D + D]: the mean state of each key block, h and z in the dtype of k; options
    as in `state_case`."""
    batch, heads, _, d = k.shape
    states = k.new_empty(batch, heads, blocks, d * d + d)
    launch = find("block_state", capability_of(k), d, 64)
    options = (feature_map, kv_len, center, weight, factors, 1 / block)
    case = state_case(k, v, *unpack(states), block, launch, *options)
    run(_linear_state_fwd_kernel, *case)
    return states


def held_sum(held: Tensor, states: Tensor) -> Tensor:
    """held [B, H, M, M'] times states [B, H, M', C], contiguous even where a size is 1."""
    out = states.new_empty(*held.shape[:3], states.shape[3])
    torch.bmm(held.flatten(0, 1), states.flatten(0, 1), out=out.flatten(0, 1))
    return out


def unpack(states: Tensor) -> tuple[Tensor, Tensor]:
    """h [B, H, M, D·D] and z [B, H, M, D] of states [B, H, M, D·D + D]: views."""
    d = int(states.shape[3] ** 0.5)
    return states[..., : d * d], states[..., d * d :]
