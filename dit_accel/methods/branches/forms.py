"""The forms of SLA: sparse and linear attention in one operator, the linear one as a branch weighs
it, and linear attention alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.branches.base import product
from dit_accel.methods.trained import Parts
from dit_accel.table import BlockTable, block_count

if TYPE_CHECKING:
    from dit_accel.methods.base import Call
    from dit_accel.methods.sla import SLA


def plain(
    method: SLA, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call, learned: Parts
) -> Tensor:
    """Both parts, by the operator that has them in one."""
    options: dict[str, Any] = {"scale": call.scale, "kv_len": call.kv_len}
    options |= {"feature_map": method.feature_map, "linear": method.linear}
    if method.linear == "marginal":
        options["skip"] = _lowest(method, q, k, call)
    if method.combine == "project":
        weight, bias = learned["weight"], learned.get("bias")
        return ops.sparse_linear_attention(q, k, v, table, weight, bias, **options)
    # α·O_s + (1 − α)·O_l = α·(O_s + e^(−gate)·O_l)
    gate = learned["gate"].float()
    eye = torch.eye(q.shape[3], device=q.device)
    out = ops.sparse_linear_attention(q, k, v, table, eye * (-gate).exp(), **options)
    return (out * gate.sigmoid()).to(q.dtype)


def weighed(
    method: SLA, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call, learned: Parts
) -> Tensor:
    """Both parts, the linear one as the branch weighs it."""
    out = ops.block_sparse_attention(q, k, v, table, call.scale, kv_len=call.kv_len)
    linear = _linear(method, q, k, v, table, call, learned)
    if "gate" not in learned:
        return (out + linear).to(q.dtype)
    share = learned["gate"].float().sigmoid()
    return (share * out + (1 - share) * linear).to(q.dtype)


def alone(
    method: SLA, q: Tensor, k: Tensor, v: Tensor, call: Call, learned: Parts | None
) -> Tensor:
    """O_lin Wᵀ + b of all keys; no block is read. W = 1 without learned weights."""
    call.note(_nothing(q, k, method.sizes(q, call)))
    return _linear(method, q, k, v, None, call, learned or {}).to(q.dtype)


def _linear(
    method: SLA, q: Tensor, k: Tensor, v: Tensor, table: BlockTable | None, call: Call, parts: Parts
) -> Tensor:
    """γ ⊙ (O_lin Wᵀ) + b [B, H, N_q, D] float32: over all keys, or those that `method.linear`
    leaves of the table's."""
    branch, sizes = method.beside, method.sizes(q, call)
    out = None
    if table is not None and method.linear in ("rest", "marginal"):
        out = table if method.linear == "rest" else table.union(_lowest(method, q, k, call))
    if call.kv_len is not None:  # a weight of padding has no gradient
        k, v = (x.where(ops.key_mask(x, call.kv_len), 0) for x in (k, v))
    keys = branch.keys(q, k, call, parts)
    blocks, rms = branch.blocks(q, k, call, sizes, parts), branch.has("rms")
    weight, bias = parts.get("weight"), parts.get("bias")
    told = blocks is None and (keys is None or rms or method.feature_map == "relu")
    if told and not branch.has("replaces"):
        linear = _fused(method, q, k, v, keys, out, call)
    else:
        held = None if out is None else (~out.to_mask()).float()
        own = branch.linear(q, k, v, call, method.feature_map, (held, sizes), parts)
        linear = _weighted(method, q, k, v, keys, product((held, blocks)), call, own)
    linear = linear if weight is None else linear @ weight.float().mT
    linear = linear if call.gate is None else linear * call.gate
    return linear if bias is None else linear + bias.float()


def _fused(
    method: SLA,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    out: BlockTable | None,
    call: Call,
) -> Tensor:
    """O_lin float32 by the kernels of the plain branch, where they can be told of g: relu takes it
    out of φ(g·k), and what is divided by its own size does not ask for the divisor, so that g may
    stand at v alone."""
    rms = method.beside.has("rms")
    if keys is not None and rms:
        v = v * keys[..., None].to(v.dtype)
    elif keys is not None:
        k = k * keys[..., None].to(k.dtype)
    linear = ops.linear_attention(q, k, v, None, method.feature_map, out, call.kv_len)
    return ops.over_rms(linear) if rms else linear.float()


def _weighted(
    method: SLA,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    blocks: Tensor | None,
    call: Call,
    own: Tensor | None,
) -> Tensor:
    """O_lin float32 in plain torch: what the branch has in its place, or with its weights."""
    rms = method.beside.has("rms")
    if own is not None:
        return ops.over_rms(own) if rms else own
    options = (method.sizes(q, call), rms, call.kv_len)
    return ops.weighted_linear_attention(q, k, v, method.feature_map, keys, blocks, *options)


def _lowest(method: SLA, q: Tensor, k: Tensor, call: Call) -> BlockTable:
    """The `skip` worst blocks: the best ones of the opposite query."""
    return ops.block_table(-q, k, method.skip, *method.sizes(q, call), kv_len=call.kv_len)


def _nothing(q: Tensor, k: Tensor, sizes: tuple[int, int]) -> BlockTable:
    """The table of no block."""
    shape = (*q.shape[:2], block_count(q.shape[2], sizes[0]))
    counts = torch.zeros(shape, dtype=torch.int32, device=q.device)
    return BlockTable(counts[..., None], counts, *sizes, q.shape[2], k.shape[2])
