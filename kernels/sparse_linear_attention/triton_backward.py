"""Gradients of the linear branch on CUDA, in Triton: what the README derives, in two kernels.

    r = 1/(φ(q)·Z + ε),  a = r φ(q),  t = dO H'ᵀ,  δ = a·t,  dφ(q) = r (t − δ Z)
    G_n = aᵀ dO,  y_n = Σ a δ;   G_m, y_m = Σ_n held_nm G_n, y_n
    dv' = φ(k) G_m,  dφ(k) = v' G_mᵀ − y_m

H' and v' = v Wᵀ are projected. Gradients of features come from deviations of the values, so c', the
mean of v', is taken off before H' is rounded: t and δ are then those of v' − c', and δ loses
(dO·c') ε r. G and y are states of the queries: the kernel of states.py makes them too. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import Launch, capability_of, find, padded, run
from dit_accel.kernels.sparse_linear_attention.features import EPS, key_mask
from dit_accel.kernels.sparse_linear_attention.states import (
    block_states,
    feature_index,
    features,
    held_sum,
    load_rows,
    mean_state,
    parts,
    store_rows,
    unpack,
    whole_state,
)
from dit_accel.kernels.tiles import key_limits
from dit_accel.table import BlockTable, block_count


@triton.jit
def _features_bwd(b_g, b_y, PHI: tl.constexpr):
    """The gradient of x from that of y = φ(x)."""
    if PHI == 0:
        b_g = b_y * (b_g - tl.sum(b_g * b_y, 1)[:, None])
    elif PHI == 1:
        b_g = b_g * tl.minimum(b_y, 1.0)
    else:
        b_g = tl.where(b_y > 0, b_g, 0.0)
    return b_g


@triton.jit(do_not_specialize=["eps", "n_q", "n_span"])
def _linear_branch_bwd_dq_kernel(
    q, do, dq, state, total, eps, center, ratio, delta, s_q, s_do, s_dq, s_h, s_z, n_q, n_span,
    d: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, PHI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_n = i_m * TILE // n_span
    o_q, o_d = i_m * TILE + tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    x_q = q + i_b.to(tl.int64) * s_q[0] + i_h.to(tl.int64) * s_q[1]
    x_do = do + i_b.to(tl.int64) * s_do[0] + i_h.to(tl.int64) * s_do[1]
    x_dq = dq + i_b.to(tl.int64) * s_dq[0] + i_h.to(tl.int64) * s_dq[1]
    b_h = load_rows(state + i_bh * s_h[0] + i_n * s_h[1], o_d, d, d, 1, d, BLOCK_D)
    b_do = load_rows(x_do, o_q, n_q, s_do[2], s_do[3], d, BLOCK_D)
    # [TQ, BD] @ [BD, BD] -> [TQ, BD]
    b_t = tl.dot(b_do, tl.trans(b_h), input_precision=PRECISION)
    p_z = total + i_bh * s_z[0] + i_n * s_z[1] + o_d
    b_z = tl.load(p_z, mask=o_d < d, other=0.0).to(tl.float32)
    b_eps = tl.load(eps + i_bh * tl.cdiv(n_q, n_span) + i_n)
    b_y = load_rows(x_q, o_q, n_q, s_q[2], s_q[3], d, BLOCK_D)
    b_y = features(b_y, o_q, n_q, d, BLOCK_D, PHI)
    b_r = 1.0 / (tl.sum(b_y * b_z[None, :], 1) + b_eps)
    b_c = tl.load(center + i_bh * d + o_d, mask=o_d < d, other=0.0)
    b_c = tl.sum(b_do.to(tl.float32) * b_c[None, :], 1)
    b_delta = (tl.sum(b_y * b_t, 1) - b_c * b_eps) * b_r
    b_g = _features_bwd((b_t - b_delta[:, None] * b_z[None, :]) * b_r[:, None], b_y, PHI)
    store_rows(x_dq, b_g, o_q, n_q, s_dq[2], s_dq[3], d, BLOCK_D)
    tl.store(ratio + i_bh * n_q + o_q, b_r, mask=o_q < n_q)
    tl.store(delta + i_bh * n_q + o_q, b_delta, mask=o_q < n_q)


@triton.jit(do_not_specialize=["n_k", "n_max", "n_span"])
def _linear_branch_bwd_dkdv_kernel(
    k, v, dk, dv, grad_state, grad_total, center, kv_len,
    s_k, s_v, s_dk, s_dv, s_h, s_z, n_k, n_max, n_span, d: tl.constexpr, scale,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, PHI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_s = i_m * TILE // n_span
    n_valid = n_k
    if kv_len is not None:
        n_valid = tl.minimum(tl.load(kv_len + i_b).to(tl.int32), n_k)
    o_k, o_d = i_m * TILE + tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    x_k = k + i_b.to(tl.int64) * s_k[0] + i_h.to(tl.int64) * s_k[1]
    x_v = v + i_b.to(tl.int64) * s_v[0] + i_h.to(tl.int64) * s_v[1]
    x_dk = dk + i_b.to(tl.int64) * s_dk[0] + i_h.to(tl.int64) * s_dk[1]
    x_dv = dv + i_b.to(tl.int64) * s_dv[0] + i_h.to(tl.int64) * s_dv[1]
    b_h = load_rows(grad_state + i_bh * s_h[0] + i_s * s_h[1], o_d, d, d, 1, d, BLOCK_D)
    p_z = grad_total + i_bh * s_z[0] + i_s * s_z[1] + o_d
    b_z = tl.load(p_z, mask=o_d < d, other=0.0).to(tl.float32)
    b_c = tl.load(center + i_bh * d + o_d, mask=o_d < d, other=0.0)
    b_y = load_rows(x_k, o_k, n_valid, s_k[2], s_k[3], d, BLOCK_D)
    b_y = features(b_y, o_k, n_valid, d, BLOCK_D, PHI)
    # [TK, BD] @ [BD, BD] -> [TK, BD]
    b_dv = tl.dot(b_y.to(b_h.dtype), b_h, input_precision=PRECISION) * scale
    store_rows(x_dv, b_dv, o_k, n_max, s_dv[2], s_dv[3], d, BLOCK_D)
    b_v = load_rows(x_v, o_k, n_valid, s_v[2], s_v[3], d, BLOCK_D)
    b_v = (b_v.to(tl.float32) - b_c[None, :]).to(b_v.dtype)
    # [TK, BD] @ [BD, BD] -> [TK, BD]
    b_g = tl.dot(b_v, tl.trans(b_h), input_precision=PRECISION)
    b_g = _features_bwd((b_g - b_z[None, :]) * scale, b_y, PHI)
    store_rows(x_dk, b_g, o_k, n_max, s_dk[2], s_dk[3], d, BLOCK_D)


def linear_branch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    excluded: BlockTable | None,
    weight: Tensor,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dW of `linear_branch` in the layouts of q, k and v; sums are in float32."""
    grads = {f"d{name}": torch.empty_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    tensors = {"q": q, "k": k, "v": v, "do": grad, **grads}
    if excluded is None:
        dv, dw = _all_backward(tensors, weight, feature_map, kv_len)
    else:
        dv, dw = _rest_backward(tensors, excluded, weight, feature_map, kv_len)
    return grads["dq"], grads["dk"], dv, dw.to(weight.dtype)


def _all_backward(
    tensors: dict[str, Tensor], weight: Tensor, feature_map: str, kv_len: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """One state per head: W goes into it, and the gradient of the state gives dW."""
    q, k, v, do = (tensors[name] for name in ("q", "k", "v", "do"))
    launch = find("linear_backward", capability_of(q), q.shape[3], 128)
    weight, center = weight.float(), _value_mean(v, kv_len)
    sums = whole_state(k, v, feature_map, kv_len, center)
    state, total, share = mean_state(*sums, k, kv_len)
    projected = (state @ weight.mT).to(q.dtype)
    queries = {
        **_some(tensors, "q", "do", "dq"), "state": projected[:, :, None], "eps": EPS * share,
        "total": total[:, :, None], "center": center @ weight.mT, **_row_factors(q),
    }  # fmt: skip
    run(_linear_branch_bwd_dq_kernel, *dq_case(queries, q.shape[2], launch, feature_map))
    factors = (queries["ratio"], queries["delta"])
    grad_state, grad_total = whole_state(q, do, feature_map, factors=factors)
    limit = torch.finfo(q.dtype).max
    key_state = (grad_state @ weight * share[..., None]).clamp(-limit, limit).to(q.dtype)
    keys = {
        **_some(tensors, "k", "v", "dk", "dv"), "center": center,
        "grad_state": key_state[:, :, None], "grad_total": (grad_total * share)[:, :, None],
    }  # fmt: skip
    case = dkdv_case(keys, k.shape[2], launch, feature_map, kv_len)
    run(_linear_branch_bwd_dkdv_kernel, *case)
    state = state + total[..., None] * center[:, :, None]
    return tensors["dv"], (grad_state.mT @ state).sum((0, 1))


def _rest_backward(
    tensors: dict[str, Tensor],
    excluded: BlockTable,
    weight: Tensor,
    feature_map: str,
    kv_len: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One state per block, of projected values; W is applied to their gradients."""
    v, weight = tensors["v"], weight.to(tensors["v"].dtype)
    values = _project(v, weight.mT)
    tensors = {**tensors, "v": values, "center": _value_mean(values, kv_len)}
    launch = find("linear_backward", capability_of(v), v.shape[3], 128)
    spans, rows = (excluded.block_q, excluded.block_k), excluded.query_blocks
    for part in parts(v, excluded):
        here = {name: x[:, part.heads] for name, x in tensors.items()}
        here["center"] = here["center"].contiguous()
        options = (feature_map, kv_len, here["center"])
        states = block_states(here["k"], here["v"], spans[1], part.held.shape[3], *options)
        state, total = unpack(held_sum(part.held, states))
        queries = {
            **_some(here, "q", "do", "dq", "center"), "state": state, "eps": part.eps,
            "total": total, **_row_factors(here["q"]),
        }  # fmt: skip
        run(_linear_branch_bwd_dq_kernel, *dq_case(queries, spans[0], launch, feature_map))
        factors = (queries["ratio"], queries["delta"])
        grads = block_states(here["q"], here["do"], spans[0], rows, feature_map, factors=factors)
        grad_state, grad_total = unpack(held_sum(part.held.mT, grads))
        keys = _some(here, "k", "v", "dk", "dv", "center")
        keys |= {"grad_state": grad_state, "grad_total": grad_total}
        case = dkdv_case(keys, spans[1], launch, feature_map, kv_len, spans[0] / spans[1])
        run(_linear_branch_bwd_dkdv_kernel, *case)
    dw, _ = whole_state(tensors["dv"], v, "identity", kv_len)
    return _project(tensors["dv"], weight), dw.sum((0, 1))


def dq_case(
    tensors: dict[str, Tensor], span: int, launch: Launch, feature_map: str = "softmax"
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the dq kernel; a state [B, H, M, …] for each `span` queries."""
    q, common = tensors["q"], _common(tensors["q"], tensors["state"], span, launch, feature_map)
    arguments = {
        **tensors, **common, **_strides(tensors, "q", "do", "dq"),
        "s_z": tensors["total"].stride()[1:3], "n_q": q.shape[2],
    }  # fmt: skip
    return (block_count(q.shape[2], common["TILE"]), q.shape[1], q.shape[0]), arguments, launch


def dkdv_case(
    tensors: dict[str, Tensor],
    span: int,
    launch: Launch,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
    scale: float = 1.0,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the dk and dv kernel; a gradient of a state, times scale, for
    each `span` keys."""
    k, state = tensors["k"], tensors["grad_state"]
    common = _common(k, state, span, launch, feature_map)
    limits = key_limits(k, kv_len)
    limits.pop("PADDED")
    arguments = {
        **tensors, **common, **limits, **_strides(tensors, "k", "v", "dk", "dv"),
        "s_z": tensors["grad_total"].stride()[1:3], "n_max": k.shape[2], "scale": scale,
    }  # fmt: skip
    return (block_count(k.shape[2], common["TILE"]), k.shape[1], k.shape[0]), arguments, launch


def _common(
    x: Tensor, state: Tensor, span: int, launch: Launch, feature_map: str
) -> dict[str, object]:
    """What both kernels are launched with."""
    d = x.shape[3]
    return {
        "s_h": state.stride()[1:3], "n_span": span, "d": d, "BLOCK_D": padded(d),
        "TILE": launch.tile if state.shape[2] == 1 else min(launch.tile, span),
        "PHI": feature_index(feature_map), "PRECISION": launch.precision,
    }  # fmt: skip


def _some(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def _strides(tensors: dict[str, Tensor], *names: str) -> dict[str, tuple[int, ...]]:
    return {f"s_{name}": tensors[name].stride() for name in names}


def _row_factors(q: Tensor) -> dict[str, Tensor]:
    """Places for r and δ of each query."""
    return {name: q.new_empty(q.shape[:3], dtype=torch.float32) for name in ("ratio", "delta")}


def _value_mean(v: Tensor, kv_len: int | Tensor | None) -> Tensor:
    """[B, H, D] float32: the mean of the valid values."""
    if kv_len is None:
        return v.mean(2, dtype=torch.float32)
    valid = key_mask(v, kv_len)
    return v.where(valid, 0).sum(2, dtype=torch.float32) / valid.sum(2).clamp(min=1)


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, H, N, D] times weight, in the layout of x."""
    tokens = x.transpose(1, 2)
    return (tokens @ weight).transpose(1, 2) if tokens.is_contiguous() else x @ weight
