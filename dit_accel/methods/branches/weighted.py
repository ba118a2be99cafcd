"""The linear branch of SLA as a branch of its own weighs it, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dit_accel import ops
from dit_accel.methods.branches.base import product
from dit_accel.methods.trained import Parts
from dit_accel.table import BlockTable

if TYPE_CHECKING:
    from dit_accel.methods.base import Call
    from dit_accel.methods.sla import SLA


def weighted(
    method: SLA, q: Tensor, k: Tensor, v: Tensor, table: BlockTable | None, call: Call, parts: Parts
) -> Tensor:
    """O_lin [B, H, N_q, D] float32, not projected: over all keys, or those that `method.linear`
    leaves of the table's. parts: the layer's tensors."""
    branch, sizes = method.beside, method.sizes(q, call)
    held = None
    if table is not None and method.linear in ("rest", "marginal"):
        out = table if method.linear == "rest" else table.union(lowest(method, q, k, call))
        held = (~out.to_mask()).float()
    k = k if call.kv_len is None else k.where(ops.key_mask(k, call.kv_len), 0)
    keys = branch.keys(q, k, call, parts)
    blocks = product((held, branch.blocks(q, k, call, sizes, parts)))
    return ops.weighted_linear_attention(
        q, k, v, method.feature_map, keys, blocks, sizes, branch.has("rms"), call.kv_len
    )


def lowest(method: SLA, q: Tensor, k: Tensor, call: Call) -> BlockTable:
    """The `skip` worst blocks: the best ones of the opposite query."""
    return ops.block_table(-q, k, method.skip, *method.sizes(q, call), kv_len=call.kv_len)
