"""The kernels of ragged tiles for a 480p video (6 × 8 × 13 of them), on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.aot_inputs import Case, empty
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.ragged_attention import triton as forward
from dit_accel.kernels.ragged_attention import triton_backward as backward
from dit_accel.table import BlockTable

_HEADS, _N, _TILES, _KEPT = (1, 12), 32760, 624, 125


def _tiles(block: int) -> tuple[BlockTable, tuple[Tensor, Tensor]]:
    """A table without memory, and the bounds of its tiles."""
    counts = empty(*_HEADS, _TILES, dtype=torch.int32)
    indices = empty(*_HEADS, _TILES, _KEPT, dtype=torch.int32)
    bounds = empty(_TILES + 1, dtype=torch.int32)
    n = _TILES * block
    return BlockTable(indices, counts, block, block, n, n), (bounds, bounds)


def _tokens(head_dim: int, dtype: torch.dtype) -> Tensor:
    return empty(_HEADS[0], _N, _HEADS[1], head_dim, dtype=dtype).transpose(1, 2)


def forward_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The forward kernel, with a gate."""
    x, (table, bounds) = _tokens(head_dim, dtype), _tiles(launch.block)
    coarse = empty(*_HEADS, _TILES, head_dim)
    call = (x, x, x, x, empty(*_HEADS, _N), table, bounds, launch, None, x, coarse, table.counts)
    return forward._ragged_attention_fwd_kernel, forward.forward(*call)[1]


def dq_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The dq kernel."""
    x, (table, bounds) = _tokens(head_dim, dtype), _tiles(launch.block)
    _, arguments, _ = backward.dq_launch(_given(x), table, bounds, None, launch, x)
    return backward._ragged_attention_bwd_dq_kernel, arguments


def dkdv_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The dk and dv kernel."""
    x, (table, bounds) = _tokens(head_dim, dtype), _tiles(launch.block)
    rows = empty(table.indices.numel(), dtype=torch.int32)
    transposed = (table.counts.long(), table.counts, rows)
    _, arguments, _ = backward.dkdv_launch(_given(x), table, bounds, None, launch, transposed, x, x)
    return backward._ragged_attention_bwd_dkdv_kernel, arguments


def _given(x: Tensor) -> dict[str, Tensor]:
    lse = empty(*_HEADS, _N)
    return {"q": x, "k": x, "v": x, "do": x, "lse": lse, "delta": lse}


CASES = {"ragged": forward_case, "ragged_dq": dq_case, "ragged_dkdv": dkdv_case}
