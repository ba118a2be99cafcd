"""Launch of the Hopper kernel of attention in eight bits: what it serves, grid and arguments."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.block_sparse_attention import gluon as hopper
from dit_accel.kernels.int8_attention.gluon_kernel import _int8_attention_hopper_fwd_kernel
from dit_accel.kernels.int8_attention.quantize import Quantized
from dit_accel.kernels.launch import Launch, run
from dit_accel.kernels.tiles import log2_scale, table_rows
from dit_accel.table import BlockTable

# What benchmarks/gpu_int8.py tries; the launch table has the fastest.
CANDIDATES = tuple(
    Launch("int8", 90, 128, 128, 64, 4, stages, True, True, provenance="a candidate")
    for stages in (4, 3)
)
# Keys of a row that the tensor cores may add up, in 13 bits: with 18,900 the error is 3.90 % where
# sums in float32 have 3.88 (benchmarks/results/h200-int8.json).
KEYS = 16384


def unserved(
    q: Tensor,
    out: Tensor,
    table: BlockTable,
    launch: Launch,
    kv_len: int | Tensor | None = None,
) -> str | None:
    """Why this kernel cannot serve a call of `forward`, or None."""
    if table.block_q != 128:
        return f"it has blocks of 128 queries, not {table.block_q}"
    if table.indices.shape[-1] * table.block_k > KEYS:
        return f"it adds up to {KEYS} keys of a row, not {table.indices.shape[-1] * table.block_k}"
    # q and out are read and written as there, and keys and values are our own
    return hopper.unserved(q, q, q, out, None, table, launch, None, kv_len)


def attend(*call: object) -> None:
    """Run the kernel with the arguments of `forward`."""
    run(_int8_attention_hopper_fwd_kernel, *forward(*call))


def forward(
    q: Tensor,
    keys: Quantized,
    out: Tensor,
    lse: Tensor | None,
    table: BlockTable,
    launch: Launch,
    scale: float | None = None,
    kv_len: int | None = None,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch, as of forward in triton.py, for calls that `unserved` accepts."""
    heads, n_q, d = q.shape[1:]
    n_valid = table.n_k if kv_len is None else min(kv_len, table.n_k)
    indices, width = table_rows(table)
    counts = hopper.valid_counts(table, n_valid)
    rows = counts.numel()
    arguments = {
        "d_q": hopper.descriptor(q, n_q, 64), "d_o": hopper.descriptor(out, n_q, 64),
        "d_k": _descriptor(keys.k, 64, d), "d_v": _descriptor(keys.v, d, 64),
        "k_scale": keys.k_scale, "v_exponent": keys.v_exponent, "mean": keys.mean, "lse": lse,
        "indices": indices, "counts": counts, "n_q": n_q, "n_valid": n_valid, "width": width,
        "m_q": counts.shape[2], "n_heads": heads, "n_rows": rows,
        "n_groups": keys.k_scale.shape[2], "scale": log2_scale(scale, q),
        "BLOCK_Q": table.block_q, "BLOCK_K": table.block_k, "D": d, "STAGES": launch.stages,
    }  # fmt: skip
    return (min(rows, hopper.multiprocessors(q.device)),), arguments, launch


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of 8-bit numbers of a head of [B, H, R, C]."""
    box, layout = [1, 1, rows, columns], hopper.layout(columns, 8)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)
