"""The linear branch on CUDA, in Triton: states of keys, and a kernel that adds them to O_sparse.

    O_i = base_i + φ(q_i) H_n Wᵀ / (φ(q_i)·Z_n + ε) + b

H_n and Z_n are means, so that they fit float16, with W in them. With nothing excluded there is one
of each per head. With excluded blocks, H_n sums the states of the blocks that row n holds: nothing
is ever subtracted. See states.py.

Hopper's forward kernel adds the branch over all keys itself, at the end of each row, where it
serves the call: O_sparse is then neither written nor read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.triton import block_sparse_attention
from dit_accel.kernels.launch import Launch, capability_of, find, padded, run, unsupported
from dit_accel.kernels.sparse_linear_attention.features import EPS, key_share
from dit_accel.kernels.sparse_linear_attention.states import (
    block_states,
    feature_index,
    features,
    held_sum,
    load_rows,
    parts,
    project,
    span_states,
    store_rows,
    unpack,
)
from dit_accel.kernels.sparse_linear_attention.triton_backward import linear_branch_backward
from dit_accel.table import BlockTable, block_count

__all__ = ["linear_branch", "linear_branch_backward", "sparse_linear_attention", "supports"]


@triton.jit(do_not_specialize=["eps", "n_q", "n_span"])
def _linear_branch_fwd_kernel(
    base, q, o, state, total, eps, bias, s_c, s_q, s_o, s_h, s_z, n_q, n_span,
    d: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, PHI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    i_n = i_m * BLOCK_Q // n_span
    o_q, o_d = i_m * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    x_q = q + i_b.to(tl.int64) * s_q[0] + i_h.to(tl.int64) * s_q[1]
    b_q = load_rows(x_q, o_q, n_q, s_q[2], s_q[3], d, BLOCK_D)
    b_q = features(b_q, o_q, n_q, d, BLOCK_D, PHI)
    p_z = total + i_bh * s_z[0] + i_n * s_z[1] + o_d
    b_z = tl.load(p_z, mask=o_d < d, other=0.0).to(tl.float32)
    b_n = tl.sum(b_q * b_z[None, :], 1) + tl.load(eps + i_bh * tl.cdiv(n_q, n_span) + i_n)
    b_h = load_rows(state + i_bh * s_h[0] + i_n * s_h[1], o_d, d, d, 1, d, BLOCK_D)
    # [BQ, BD] @ [BD, BD] -> [BQ, BD]
    b_o = tl.dot(b_q.to(b_h.dtype), b_h, input_precision=PRECISION) / b_n[:, None]
    if bias is not None:
        b_o += tl.load(bias + o_d, mask=o_d < d, other=0.0).to(tl.float32)[None, :]
    x_c = base + i_b.to(tl.int64) * s_c[0] + i_h.to(tl.int64) * s_c[1]
    b_o += load_rows(x_c, o_q, n_q, s_c[2], s_c[3], d, BLOCK_D).to(tl.float32)
    x_o = o + i_b.to(tl.int64) * s_o[0] + i_h.to(tl.int64) * s_o[1]
    store_rows(x_o, b_o, o_q, n_q, s_o[2], s_o[3], d, BLOCK_D)


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
    if weight is not None and excluded is None:
        out = torch.empty_like(q)
        launch = find("forward", capability_of(q), q.shape[-1], table.block_q)
        call = (q, k, v, out, None, table, launch, scale, kv_len)
        if unfused(*call) is None:
            attend(call, weight, bias, feature_map)
            return out
    base = block_sparse_attention(q, k, v, table, scale, kv_len=kv_len)
    if weight is None:
        return base
    return linear_branch(base, q, k, v, excluded, weight, bias, feature_map, kv_len, into=base)


def unfused(*call: object) -> str | None:
    """Why no kernel adds the branch over all keys to what it computes with these arguments of
    `block_sparse_attention.triton.attend`, or None."""
    if not call[6].specialized or not call[0].is_cuda:
        return "the launch table names no kernel with roles here"
    from dit_accel.kernels.block_sparse_attention import gluon as hopper

    return hopper.unserved(*call)


def attend(call: tuple[object, ...], weight: Tensor, bias: Tensor | None, feature_map: str) -> None:
    """Run Hopper's forward kernel with the branch over all keys."""
    from dit_accel.kernels.block_sparse_attention import gluon as hopper

    k, v, kv_len = call[1], call[2], call[8]
    state, total = projected_state(k, v, weight, feature_map, kv_len)
    bias, eps = None if bias is None else bias.contiguous(), EPS * key_share(k, kv_len)
    hopper.attend(*call, None, None, hopper.Linear(state, total, bias, eps, feature_map))


def projected_state(
    k: Tensor, v: Tensor, weight: Tensor, feature_map: str, kv_len: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Σ φ(k_j)ᵀ v_j Wᵀ over all keys in the dtype of v and Σ φ(k_j) in float32, times key_share."""
    states = span_states(k, v, feature_map, kv_len, scale=key_share(k, kv_len))
    return project(*states, weight, v.dtype)


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
    into: Tensor | None = None,
) -> Tensor:
    """base plus the projected linear attention over all key blocks but `excluded`'s (None: all).

    into: where the result goes, base itself perhaps.
    """
    out = torch.empty_like(q) if into is None else into
    bias = None if bias is None else bias.contiguous()
    if excluded is None:
        state, total = projected_state(k, v, weight, feature_map, kv_len)
        eps = total.new_full(total.shape[:2], EPS * key_share(k, kv_len))
        tensors = {"base": base, "q": q, "o": out, "bias": bias, "eps": eps}
        launch = find("linear", capability_of(q), q.shape[3], 64)
        tensors |= {"state": state[:, :, None], "total": total[:, :, None]}
        run(_linear_branch_fwd_kernel, *branch_case(tensors, q.shape[2], launch, feature_map))
        return out
    launch = find("linear", capability_of(q), q.shape[3], excluded.block_q)
    weight = weight.to(q.dtype).contiguous()
    for part in parts(k, excluded):
        here = part.heads
        keys = (k[:, here], v[:, here], excluded.block_k, part.held.shape[3])
        states = block_states(*keys, feature_map, kv_len, weight=weight)
        state, total = unpack(held_sum(part.held, states))
        tensors = {"base": base[:, here], "q": q[:, here], "o": out[:, here], "bias": bias}
        tensors |= {"eps": part.eps, "state": state, "total": total}
        case = branch_case(tensors, excluded.block_q, launch, feature_map)
        run(_linear_branch_fwd_kernel, *case)
    return out


def branch_case(
    tensors: dict[str, Tensor | None], span: int, launch: Launch, feature_map: str = "softmax"
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the branch kernel; a state for each `span` rows of queries."""
    q, state, total = tensors["q"], tensors["state"], tensors["total"]
    names = {"s_c": "base", "s_q": "q", "s_o": "o"}
    block = min(launch.tile, span) if state.shape[2] > 1 else launch.tile
    arguments = {
        **tensors, **{stride: tensors[name].stride() for stride, name in names.items()},
        "s_h": state.stride()[1:3], "s_z": total.stride()[1:3], "n_q": q.shape[2],
        "n_span": span, "d": q.shape[3], "BLOCK_Q": block, "BLOCK_D": padded(q.shape[3]),
        "PHI": feature_index(feature_map), "PRECISION": launch.precision,
    }  # fmt: skip
    return (block_count(q.shape[2], block), q.shape[1], q.shape[0]), arguments, launch
