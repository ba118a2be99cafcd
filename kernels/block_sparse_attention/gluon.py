"""Launch of the Hopper kernel of block-sparse attention: what it serves, grid and arguments."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import log2
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.block_sparse_attention.gluon_kernel import (
    _block_sparse_attention_hopper_fwd_kernel,
)
from dit_accel.kernels.launch import Launch, capability_of, run
from dit_accel.kernels.tiles import log2_scale, table_rows
from dit_accel.table import BlockTable, block_count

# What benchmarks/gpu_gluon.py tries; the launch table has the fastest.
CANDIDATES = tuple(
    Launch("forward", 90, 128, block, tile, 4, stages, True, True, provenance="a candidate")
    for block, tile, stages in (
        *((128, 128, 2), (128, 64, 3), (128, 64, 4), (128, 64, 5)),
        *((64, 64, 2), (64, 64, 3)),
    )
)
CANDIDATES += (
    replace(CANDIDATES[-2], counter=True),
    *(replace(CANDIDATES[0], pairs=True, counter=x) for x in (True, False)),
)
# Rows of a lane from which on a counter deals them out: with 6 its zeroing costs more than it
# gains, with 23 less (benchmarks/results/h200-gluon-counter.json).
COUNTED = 16
# The numbers of the feature maps in the kernel.
_FEATURES = {"softmax": 0, "elu": 1, "relu": 2}


class Linear(NamedTuple):
    """What a row adds: φ(q) S / (φ(q)·z + ε) + bias; S [B, H, D, D] in the dtype of q,
    z [B, H, D] float32 and bias [D] or None, contiguous."""

    state: Tensor
    total: Tensor
    bias: Tensor | None
    eps: float
    feature_map: str


def unserved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    table: BlockTable,
    launch: Launch,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    pool: tuple[Tensor, Tensor, Tensor] | None = None,
    rectify: tuple[Tensor, Tensor] | None = None,
    linear: Linear | None = None,
) -> str | None:
    """Why this kernel cannot serve a call of `forward`, or None."""
    if linear is not None and (lse is not None or pool or rectify):
        return "it adds a linear branch to nothing but the plain output, without LSE"
    return unknown(q, table, kv_len) or unreadable(q, k, v, out)


def unknown(q: Tensor, table: BlockTable, kv_len: int | Tensor | None) -> str | None:
    """Why no kernel here is for this machine, head and table, or None."""
    if tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 6):
        return f"it needs triton 3.6 or newer, not {triton.__version__}"
    if capability_of(q) != 90:
        return f"it is for compute capability 9.0, not {capability_of(q) / 10}"
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] not in (64, 128):
        return f"it has 16-bit heads of 64 and 128, not {q.dtype} of {q.shape[-1]}"
    if not {table.block_q, table.block_k} <= {64, 128}:
        return f"it has blocks of 64 and 128, not {table.block_q} and {table.block_k}"
    if isinstance(kv_len, Tensor) or kv_len == 0:
        return "it takes kv_len as a positive integer"
    return "the table has no column" if table.indices.shape[-1] == 0 else None


def unreadable(*tensors: Tensor) -> str | None:
    """Why TMA cannot read or write one of these, or None."""
    for x in tensors:
        step = 16 // x.element_size()
        whole = all(s > 0 and s % step == 0 for s in x.stride()[:-1])
        if x.stride(-1) != 1 or x.data_ptr() % 16 or not whole:
            return f"TMA cannot read strides {x.stride()}"
    return None


def attend(*call: object) -> None:
    """Run the kernel with the arguments of `forward`."""
    run(_block_sparse_attention_hopper_fwd_kernel, *forward(*call))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    table: BlockTable,
    launch: Launch,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    pool: tuple[Tensor, Tensor, Tensor] | None = None,
    rectify: tuple[Tensor, Tensor] | None = None,
    linear: Linear | None = None,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch, as of forward in triton.py, for calls that `unserved` accepts."""
    batch, heads, n_q, d = q.shape
    n_valid = k.shape[2] if kv_len is None else min(kv_len, k.shape[2])
    # a second lane leaves no memory for more, the pooled loop and the epilogue no registers
    narrow = table.block_q == 64 or pool or rectify or linear
    rows = tile = min(launch.tile, table.block_k, 64 if narrow else 128)
    # a state takes the place of a tile of values: as many rows as columns, or two tiles
    if launch.pairs and 64 == table.block_k < table.block_q and (linear is None or d == 128):
        tile = 128
    stages = launch.stages * launch.tile // tile
    indices, width = table_rows(table)
    counts = valid_counts(table, n_valid)
    pool_k, pool_v, bits = pool or (None, None, None)
    live = block_count(n_valid, table.block_k)
    pool_tiles = block_count(live, tile)
    ratio, shift = rectify or (None, None)
    total, bias, eps, phi = (None, None, None, 0)
    if linear is not None:
        # one more slot of a row: the state in the places of pooled keys and values
        pool_k, pool_v, pool_tiles = linear.state, linear.state, 1
        total, bias, eps = linear.total, linear.bias, linear.eps
        phi = _FEATURES[linear.feature_map]
    n_rows = counts.numel()
    lanes = 128 // table.block_q
    programs = min(block_count(n_rows, lanes), multiprocessors(q.device))
    counted = launch.counter and gains(table, d, n_rows // (lanes * programs))
    arguments = {
        "d_q": descriptor(q, n_q, 64), "d_k": descriptor(k, n_valid, rows, 64),
        "d_v": descriptor(v, n_valid, rows, 64),
        "o": out if lanes == 2 else descriptor(out, n_q, 64),
        "s_o": out.stride()[:3] if lanes == 2 else None,
        "d_pk": None if pool_k is None else descriptor(pool_k, pool_k.shape[2], rows, 64),
        "d_pv": None if pool_v is None else descriptor(pool_v, pool_v.shape[2], rows, 64),
        "lse": lse, "bits": bits, "ratio": ratio, "shift": shift, "total": total, "bias": bias,
        "indices": indices, "counts": counts,
        "taken": torch.zeros(1, dtype=torch.int32, device=q.device) if counted else None,
        "n_q": n_q, "n_valid": n_valid,
        "width": width, "m_q": counts.shape[2], "n_heads": heads, "n_rows": n_rows,
        "n_pool": live, "n_pool_tiles": pool_tiles,
        "n_words": 0 if bits is None else bits.shape[-1],
        "last": log2((n_valid - (live - 1) * table.block_k) / table.block_k),
        "scale": log2_scale(scale, q), "eps": eps,
        "BLOCK_Q": table.block_q, "BLOCK_K": table.block_k, "TILE": tile,
        "ROWS": rows, "D": d, "STAGES": stages, "PHI": phi,
    }  # fmt: skip
    return (programs,), arguments, launch


def gains(table: BlockTable, d: int, rows: int) -> bool:
    """Whether a counter gains time where each lane has so many rows, of heads of d."""
    # At [1, 40, 75600, 128] even rows of 128 queries lose 3 to 6 % and uneven ones gain 6 to 13;
    # all others mostly gain: "Rows from a counter" and "Two lanes" in benchmarks/kernels-log.md.
    return rows >= COUNTED and (table.block_q == 64 or d == 64 or table.uneven)


def valid_counts(table: BlockTable, n_valid: int) -> Tensor:
    """Counts of a table's rows, contiguous, without the blocks that hold no valid key."""
    if n_valid == table.n_k:
        return table.counts.contiguous()
    live = table.valid() & (table.indices < block_count(n_valid, table.block_k))
    return live.sum(-1, dtype=torch.int32)


def descriptor(x: Tensor, n: int, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Boxes of rows of the first n tokens of [B, H, N, D], of all columns or so many; what is
    beyond reads as zero."""
    shape = [*x.shape[:2], n, x.shape[3]]
    box = [1, 1, rows, columns or x.shape[3]]
    return TensorDescriptor(x, shape, list(x.stride()), box, layout(128, 16))


@cache
def layout(width: int, bits: int) -> gl.NVMMASharedLayout:
    """Of a box in shared memory, `width` bytes a swizzled row; to make one takes twice as long as
    the rest of a descriptor."""
    return gl.NVMMASharedLayout(width, bits, rank=4)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
