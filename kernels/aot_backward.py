"""The kernels of the gradients of block-sparse attention, to be compiled ahead of time."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.aot_inputs import SHAPE, Case, empty, table, tokens
from dit_accel.kernels.block_sparse_attention import gluon_backward as hopper
from dit_accel.kernels.block_sparse_attention import triton_backward as backward
from dit_accel.kernels.launch import Launch
from dit_accel.table import BlockTable


def dq_case(launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = "") -> Case:
    """The dq kernel; `extra` is "" or, where not specialized, "pool"."""
    x, kept = tokens(head_dim, dtype), table(launch.block, launch.block)
    if launch.specialized:
        call = hopper.dq_launch(_gradient(x, kept), launch, x)
        return hopper._block_sparse_attention_hopper_bwd_dq_kernel, call[1]
    means = empty(*SHAPE[:2], 640, head_dim, dtype=dtype)
    pool = (means, means, empty(*SHAPE[:2], kept.query_blocks, 20, dtype=torch.int32))
    given = pool if extra == "pool" else None
    call = backward.dq_launch(_tensors(x), kept, None, None, launch, x, None, x, given)
    return backward._block_sparse_attention_bwd_dq_kernel, call[1]


def dkdv_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The dk and dv kernel; for "gradients" with its sum for dq."""
    x, kept = tokens(head_dim, dtype), table(launch.block, launch.block)
    counts = empty(*SHAPE[:2], kept.key_blocks, dtype=torch.int32)
    turned = (counts.long(), counts, empty(kept.indices.numel(), dtype=torch.int32))
    if launch.specialized:
        given = _gradient(x, kept)
        total = hopper.total_of(given) if launch.op == "gradients" else None
        call = hopper.dkdv_launch(given, launch, turned, x, x, total)
        return hopper._block_sparse_attention_hopper_bwd_dkdv_kernel, call[1]
    call = backward.dkdv_launch(_tensors(x), kept, None, None, launch, turned, x, x)
    return backward._block_sparse_attention_bwd_dkdv_kernel, call[1]


def _tensors(x: Tensor) -> dict[str, Tensor]:
    lse = empty(*SHAPE)
    return {"q": x, "k": x, "v": x, "do": x, "lse": lse, "delta": lse}


def _gradient(x: Tensor, kept: BlockTable) -> hopper.Gradient:
    tiles = kept.query_blocks * kept.block_q // 64
    stats = empty(*SHAPE[:2], tiles, 2, 64)
    return hopper.Gradient(x, x, x, x, stats, kept, x.shape[-1] ** -0.5, SHAPE[2])


CASES = {"dq": dq_case, "dkdv": dkdv_case, "gradients": dkdv_case}
