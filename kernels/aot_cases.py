"""Every kernel at the size of a 480p video, on the meta device, to be compiled ahead of time.

`python -m dit_accel.kernels.aot_cases [op@capability …]` prints what the compiler makes of each row
of the launch table, as lines of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from dit_accel.kernels import aot_backward, aot_linear, aot_ragged, aot_tables
from dit_accel.kernels.aot import Report, report
from dit_accel.kernels.aot_inputs import SHAPE, Case, empty, table, tokens
from dit_accel.kernels.block_sparse_attention import gluon as hopper
from dit_accel.kernels.block_sparse_attention import gluon_backward as hopper_backward
from dit_accel.kernels.block_sparse_attention import triton as forward
from dit_accel.kernels.block_table.select import select_launch
from dit_accel.kernels.int8_attention import gluon as int8_hopper
from dit_accel.kernels.int8_attention import quantize as int8_keys
from dit_accel.kernels.int8_attention import triton as int8
from dit_accel.kernels.launch import LAUNCHES, Launch, compiler_options, find, split_head_dim
from dit_accel.kernels.norm_rope import triton as norm_rope
from dit_accel.kernels.pooled_attention import triton as pooled
from dit_accel.kernels.rectified_attention import triton as rectified
from dit_accel.table import block_count


def forward_case(launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = "") -> Case:
    """The forward kernel; `extra` is "", "pool", "rectify" or, where specialized, "linear"."""
    batch, heads, n = SHAPE
    block_k = launch.tile if launch.specialized else launch.block
    block_k = 64 if launch.pairs else block_k
    x, kept = tokens(head_dim, dtype), table(launch.block, block_k)
    rows = kept.query_blocks
    means = empty(batch, heads, 640, head_dim, dtype=dtype)
    pool = (means, means, empty(batch, heads, rows, 20, dtype=torch.int32))
    rectify = (empty(batch, heads, rows), empty(batch, heads, rows, head_dim))
    lse = empty(batch, heads, n) if extra != "linear" else None
    call = (
        x, x, x, x, lse, kept, launch, None, None,
        pool if extra == "pool" else None, rectify if extra == "rectify" else None,
    )  # fmt: skip
    if launch.specialized:
        state = empty(batch, heads, head_dim, head_dim, dtype=dtype)
        total, bias = empty(batch, heads, head_dim), empty(head_dim)
        linear = hopper.Linear(state, total, bias, 1e-9, "softmax") if extra == "linear" else None
        return hopper._block_sparse_attention_hopper_fwd_kernel, hopper.forward(*call, linear)[1]
    return forward._block_sparse_attention_fwd_kernel, forward.forward(*call)[1]


def pool_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The kernel of the gradients of pooled keys and values."""
    x, lse, (d0, d1) = tokens(head_dim, dtype), empty(*SHAPE), split_head_dim(head_dim)
    means, sums = empty(1, 12, 640, head_dim, dtype=dtype), empty(1, 1, 12, 640, head_dim)
    return pooled._pooled_attention_bwd_dkdv_kernel, {
        "q": x, "do": x, "pool_k": means, "pool_v": means, "lse": lse, "delta": lse, "kv_len": None,
        "bits": empty(1, 12, 512, 20, dtype=torch.int32), "dk": sums, "dv": sums,
        "s_q": x.stride(),
        "s_do": x.stride(), "n_q": SHAPE[2], "n_k": SHAPE[2], "n_pool": 640, "m_q": 512,
        "m_part": 256,
        "n_heads": 12, "scale2": 0.1, "BLOCK_Q": launch.block, "BLOCK_K": 64, "TILE": launch.tile,
        "D0": d0, "D1": d1, "PRECISION": launch.precision,
    }  # fmt: skip


def coefficients_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The kernel of r and C, with GAPR."""
    mean, bits = empty(*SHAPE[:2], 512, head_dim), empty(*SHAPE[:2], 512, 16, dtype=torch.int32)
    half = mean.to(dtype)
    return rectified._rectified_attention_coefficients_fwd_kernel, {
        "q": mean, "q_far": half, "k": half, "k_rest": half, "k_far": half, "v": half,
        "bits": bits, "kv_len": None, "ratio": mean, "shift": mean, "n_k": SHAPE[2], "m_q": 512,
        "m_k": 512, "d": head_dim, "scale": 0.1, "BLOCK_K": 64,
        "TILE_Q": rectified.TILE_Q, "TILE_K": launch.tile,
        "D": 1 << (head_dim - 1).bit_length(), "STAGES": launch.stages,
        "PRECISION": launch.precision,
    }  # fmt: skip


def int8_keys_of(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, int8_keys.Quantized]:
    """Tokens, and the keys and values that their quantisation gives."""
    batch, heads, n = SHAPE
    groups, width = block_count(n, launch.tile), 1 << (head_dim - 1).bit_length()
    rows = groups * launch.tile
    values = torch.float8_e4m3fn if launch.capability >= 89 else dtype
    keys = int8_keys.Quantized(
        empty(batch, heads, rows, width, dtype=torch.int8),
        empty(batch, heads, width, rows, dtype=values),
        empty(batch, heads, groups),
        empty(batch, heads, groups),
        empty(batch, heads, head_dim),
    )
    return tokens(head_dim, dtype), keys


def int8_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The attention kernel in eight bits."""
    x, keys = int8_keys_of(launch, head_dim, dtype)
    call = (x, keys, x, empty(*SHAPE), table(launch.block, launch.tile), launch)
    if launch.specialized:
        return int8_hopper._int8_attention_hopper_fwd_kernel, int8_hopper.forward(*call)[1]
    return int8._int8_attention_fwd_kernel, int8.forward(*call)[1]


def int8_quantize_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The kernel that quantises keys and values."""
    x, keys = int8_keys_of(launch, head_dim, dtype)
    return int8_keys._int8_quantize_fwd_kernel, int8_keys.quantize_arguments(x, x, keys)


def norm_rope_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The kernel of the norm and rotary embedding of queries and keys."""
    batch, heads, n = SHAPE
    x, turn = empty(batch, n, heads * head_dim, dtype=dtype), empty(1, n, 1, head_dim)
    out, weight = empty(batch, n, heads, head_dim, dtype=dtype), empty(x.shape[2], dtype=dtype)
    call = (x, x, turn, turn, out, out, (weight, weight), 1e-6, launch)
    return norm_rope._norm_rope_fwd_kernel, norm_rope.arguments(*call)


CASES: dict[str, Callable[..., Case]] = {
    "forward": forward_case,
    "pool": pool_case,
    "coefficients": coefficients_case,
    "int8": int8_case,
    "norm_rope": norm_rope_case,
    "int8_quantize": int8_quantize_case,
    **aot_backward.CASES,
    **aot_tables.CASES,
    **aot_linear.CASES,
    **aot_ragged.CASES,
}


def compile_row(launch: Launch, head_dim: int | None = None, **extra: str) -> Report:
    """Compile the kernel of a row of the launch table, by default for its own head dimension."""
    head_dim = head_dim or launch.head_dim
    kernel, arguments = CASES[launch.op](launch, head_dim, torch.bfloat16, **extra)
    options = compiler_options(launch)
    if isinstance(registers := arguments.get("maxnreg"), int):
        options["maxnreg"] = registers
    return report(kernel, arguments, launch.capability, options)


def _serves(row: Launch, head_dim: int) -> bool:
    """Whether the plain kernel takes this row for heads so wide."""
    return find(row.op, row.capability, head_dim, row.block, specialized=False) is row


def cases(wanted: set[str]) -> Iterator[tuple[Launch, int, dict[str, str]]]:
    """Rows, head dimensions and extras of `op@capability` in wanted; of every row if it is empty.

    The op "forward+" is the forward kernel with the narrower heads and the extras, "hopper" the
    candidates of its specialized form, "hopper+" those with the extras and heads of 64; "int8+" is
    the candidates of the specialized form in eight bits, with heads of 128 and 64; "backward+" is
    those of the specialized gradients.
    """
    for row in int8_hopper.CANDIDATES:
        if "int8+@90" in wanted:
            yield row, 128, {}
            yield row, 64, {}
    for row in hopper_backward.CANDIDATES:
        if "backward+@90" in wanted:
            yield row, 128, {}
            yield row, 64, {}
    for row in hopper.CANDIDATES:
        if "hopper@90" in wanted:
            yield row, 128, {}
        if "hopper+@90" in wanted:
            yield row, 128, {"extra": "pool"}
            yield row, 128, {"extra": "rectify"}
            yield row, 128, {"extra": "linear"}
            yield row, 64, {}
    for row in (*LAUNCHES, select_launch(2048), select_launch(4096)):
        place = f"@{row.capability}"
        if row.op in CASES and (not wanted or row.op + place in wanted):
            yield row, row.head_dim, {}
        if row.op == "select" and (not wanted or row.op + place in wanted):
            yield row, row.head_dim, {"extra": "mass"}
            yield row, row.head_dim, {"extra": "parts"}
        if row.op in ("means", "spreads") and (not wanted or row.op + place in wanted):
            yield row, row.head_dim, {"extra": "pool"}
        if row.op == "spreads" and (not wanted or row.op + place in wanted):
            yield row, row.head_dim, {"extra": "parts"}
        if row.op == "linear_backward" and (not wanted or row.op + place in wanted):
            yield row, row.head_dim, {"extra": "keys"}
        if row.op == "dq" and not row.specialized and (not wanted or "dq+" + place in wanted):
            yield row, row.head_dim, {"extra": "pool"}
        if row.op == "forward" and (not wanted or "forward+" + place in wanted):
            yield row, row.head_dim, {"extra": "pool"}
            yield row, row.head_dim, {"extra": "rectify"}
            served = [d for d in (80, 96) if _serves(row, d)]
            yield from ((row, d, {}) for d in served)


def main(wanted: list[str]) -> None:
    """Print one line of JSON for each case."""
    for launch, head_dim, extra in cases(set(wanted)):
        found = compile_row(launch, head_dim, **extra)
        line = {"op": launch.op, "head_dim": head_dim, "block": launch.block, **extra}
        line["pairs"] = launch.pairs
        line["provenance"] = launch.provenance
        print(json.dumps({**line, **asdict(found)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
