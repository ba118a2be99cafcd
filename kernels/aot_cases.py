"""Every kernel at the size of a 480p video, on the meta device, to be compiled ahead of time.

`python -m dit_accel.kernels.aot_cases [op@capability …]` prints what the compiler makes of each row
of the launch table, as lines of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.kernels import aot_ragged
from dit_accel.kernels.aot import Report, report
from dit_accel.kernels.block_sparse_attention import gluon as hopper
from dit_accel.kernels.block_sparse_attention import triton as forward
from dit_accel.kernels.block_sparse_attention import triton_backward as backward
from dit_accel.kernels.block_table import means as means_kernels
from dit_accel.kernels.block_table import pool as pool_kernels
from dit_accel.kernels.block_table import select as select_kernels
from dit_accel.kernels.block_table import sub as sub_kernels
from dit_accel.kernels.block_table import triton as table_kernels
from dit_accel.kernels.block_table.select import select_launch
from dit_accel.kernels.int8_attention import gluon as int8_hopper
from dit_accel.kernels.int8_attention import quantize as int8_keys
from dit_accel.kernels.int8_attention import triton as int8
from dit_accel.kernels.launch import LAUNCHES, Launch, compiler_options, find, split_head_dim
from dit_accel.kernels.pooled_attention import triton as pooled
from dit_accel.kernels.rectified_attention import triton as rectified
from dit_accel.kernels.sparse_linear_attention import states
from dit_accel.kernels.sparse_linear_attention import triton as linear
from dit_accel.kernels.sparse_linear_attention import triton_backward as linear_backward
from dit_accel.table import BlockTable, block_count

if TYPE_CHECKING:
    from triton import JITFunction


_SHAPE = (1, 12, 32760)
_KEPT = 26


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def table(block_q: int, block_k: int) -> BlockTable:
    """A table without memory, for the shape of this file."""
    batch, heads, n = _SHAPE
    rows = block_count(n, block_q)
    indices = empty(batch, heads, rows, _KEPT, dtype=torch.int32)
    return BlockTable(indices, empty(batch, heads, rows, dtype=torch.int32), block_q, block_k, n, n)


def tokens(head_dim: int, dtype: torch.dtype) -> Tensor:
    """[B, H, N, D] as diffusers gives it: a transposed [B, N, H, D]."""
    batch, heads, n = _SHAPE
    return empty(batch, n, heads, head_dim, dtype=dtype).transpose(1, 2)


def forward_case(
    launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = ""
) -> tuple[JITFunction, dict[str, object]]:
    """The forward kernel; `extra` is "", "pool", "rectify" or, where specialized, "linear"."""
    batch, heads, n = _SHAPE
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


def dq_case(
    launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = ""
) -> tuple[JITFunction, dict[str, object]]:
    """The dq kernel; `extra` is "" or "pool"."""
    x, kept = tokens(head_dim, dtype), table(launch.block, launch.block)
    lse = empty(*_SHAPE)
    tensors = {"q": x, "k": x, "v": x, "do": x, "lse": lse, "delta": lse}
    means = empty(*_SHAPE[:2], 640, head_dim, dtype=dtype)
    pool = (means, means, empty(*_SHAPE[:2], kept.query_blocks, 20, dtype=torch.int32))
    pool = pool if extra == "pool" else None
    _, arguments, _ = backward.dq_launch(tensors, kept, None, None, launch, x, None, x, pool)
    return backward._block_sparse_attention_bwd_dq_kernel, arguments


def dkdv_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The dk and dv kernel."""
    x, kept = tokens(head_dim, dtype), table(launch.block, launch.block)
    lse = empty(*_SHAPE)
    tensors = {"q": x, "k": x, "v": x, "do": x, "lse": lse, "delta": lse}
    counts = empty(*_SHAPE[:2], kept.key_blocks, dtype=torch.int32)
    transposed = (counts.long(), counts, empty(kept.indices.numel(), dtype=torch.int32))
    _, arguments, _ = backward.dkdv_launch(tensors, kept, None, None, launch, transposed, x, x)
    return backward._block_sparse_attention_bwd_dkdv_kernel, arguments


def pool_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel of the gradients of pooled keys and values."""
    x, lse, (d0, d1) = tokens(head_dim, dtype), empty(*_SHAPE), split_head_dim(head_dim)
    means, sums = empty(1, 12, 640, head_dim, dtype=dtype), empty(1, 1, 12, 640, head_dim)
    return pooled._pooled_attention_bwd_dkdv_kernel, {
        "q": x, "do": x, "pool_k": means, "pool_v": means, "lse": lse, "delta": lse, "kv_len": None,
        "bits": empty(1, 12, 512, 20, dtype=torch.int32), "dk": sums, "dv": sums,
        "s_q": x.stride(),
        "s_do": x.stride(), "n_q": _SHAPE[2], "n_k": _SHAPE[2], "n_pool": 640, "m_q": 512,
        "m_part": 256,
        "n_heads": 12, "scale2": 0.1, "BLOCK_Q": launch.block, "BLOCK_K": 64, "TILE": launch.tile,
        "D0": d0, "D1": d1, "PRECISION": launch.precision,
    }  # fmt: skip


def means_case(
    launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = ""
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel of the block means of q and k, with deviations if the row is of these; extra
    "parts": with the means of four parts, "pool": that of keys and values."""
    if extra == "pool":
        return pooled_case(launch, head_dim, dtype)
    x = tokens(head_dim, dtype)
    blocks = (*_SHAPE[:2], block_count(_SHAPE[2], launch.block), head_dim)
    mean, far = empty(*blocks), empty(*blocks, dtype=dtype) if launch.op == "spreads" else None
    sub = empty(*blocks[:2], 4 * blocks[2], head_dim, dtype=dtype) if extra == "parts" else None
    return means_kernels._block_means_fwd_kernel, {
        "q": x, "k": x, "q_mean": mean, "k_mean": mean, "q_far": far, "k_far": far,
        "q_sub": sub, "k_sub": sub, "PARTS": 4 if extra else 1,
        "kv_len": None, "s_q": x.stride(), "s_k": x.stride(), "n_q": _SHAPE[2], "n": _SHAPE[2],
        "m_q": blocks[2], "m_k": blocks[2], "d": head_dim, "BLOCK_Q": launch.block, "BLOCK_K": 64,
        **means_kernels.column_tiles(head_dim, launch),
    }  # fmt: skip


def pooled_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel of pooled keys and values; of a row of deviations, with those of the keys."""
    x, half = tokens(head_dim, dtype), empty(*_SHAPE[:2], 512, head_dim, dtype=dtype)
    known = empty(*half.shape) if launch.op == "means" else None
    return pool_kernels._block_pool_fwd_kernel, {
        "k": x, "v": x, "known": known, "k_mean": half, "k_rest": half,
        "k_far": half if known is None else None, "v_mean": half, "kv_len": None,
        "s_k": x.stride(), "s_v": x.stride(), "n": _SHAPE[2], "m_known": 512, "d": head_dim,
        "BLOCK": launch.block, **means_kernels.column_tiles(head_dim, launch),
    }  # fmt: skip


def scores_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel of the scores of block means."""
    mean = empty(*_SHAPE[:2], 512, head_dim)
    return table_kernels._block_scores_fwd_kernel, {
        "q": mean, "k": mean, "score": mean, "m_q": 512, "m_k": 512, "m_pad": 512, "d": head_dim,
        "TILE_Q": launch.tile, "TILE_K": launch.tile, "TILE_D": table_kernels.MEAN_TILE,
        "PRECISION": launch.precision,
    }  # fmt: skip


def levels_case(
    launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = "4"
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel of the levels of blocks in parts, `extra` of them."""
    rows, parts = 512 * int(extra), int(extra)
    mean = empty(*_SHAPE[:2], rows, head_dim, dtype=dtype)
    return sub_kernels._block_levels_fwd_kernel, {
        "q": mean, "k": mean, "level": empty(*_SHAPE[:2], rows, 512), "kv_len": None,
        "n_k": _SHAPE[2], "i_first": 0, "n_heads": 12, "m_q": rows, "m_k": rows, "m_pad": 512,
        "d": head_dim, "scale": 0.1, "SIZE": 64 // parts, "PARTS": parts,
        "TILE_Q": launch.block, "TILE_K": launch.tile, "D": 1 << (head_dim - 1).bit_length(),
        "STAGES": launch.stages, "PRECISION": launch.precision,
    }  # fmt: skip


def select_case(
    launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = ""
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel that chooses the blocks of a row, for as many as it serves; extra: "mass", or
    "parts" for four of a block."""
    width = 1024 * launch.warps
    top_p = {"mass": 0.3 if extra == "mass" else None, "scale": 0.1 if extra == "mass" else None}
    kept, flags = table(64, 64), empty(1, 1, 1, 2048, dtype=torch.uint8)
    return select_kernels._block_select_fwd_kernel, {
        "score": empty(1, 1), "forced": flags, "near": flags, "indices": kept.indices,
        "counts": kept.counts, "bits": kept.counts, "kv_len": None, "wants": None,
        "s_f": (0, 0, 0, 1), "s_n": (2048, 1), "s_w": (0, 0),
        "i_first": 0, "n_heads": 12, **top_p, "n_q": 75600, "n_k": 75600,
        "m_k": 1182, "m_pad": 1184, "n_want": 60, "width": 80, "n_words": 40,
        "BLOCK_Q": 64, "BLOCK_K": 64, "PARTS": 4 if extra == "parts" else 1, "M": width,
    }  # fmt: skip


def coefficients_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel of r and C, with GAPR."""
    mean, bits = empty(*_SHAPE[:2], 512, head_dim), empty(*_SHAPE[:2], 512, 16, dtype=torch.int32)
    half = mean.to(dtype)
    return rectified._rectified_attention_coefficients_fwd_kernel, {
        "q": mean, "q_far": half, "k": half, "k_rest": half, "k_far": half, "v": half,
        "bits": bits, "kv_len": None, "ratio": mean, "shift": mean, "n_k": _SHAPE[2], "m_q": 512,
        "m_k": 512, "d": head_dim, "scale": 0.1, "BLOCK_K": 64,
        "TILE_Q": rectified.TILE_Q, "TILE_K": launch.tile,
        "D": 1 << (head_dim - 1).bit_length(), "STAGES": launch.stages,
        "PRECISION": launch.precision,
    }  # fmt: skip


def int8_keys_of(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, int8_keys.Quantized]:
    """Tokens, and the keys and values that their quantisation gives."""
    batch, heads, n = _SHAPE
    groups, width = block_count(n, launch.tile), 1 << (head_dim - 1).bit_length()
    rows = groups * launch.tile
    values = torch.float8_e4m3fn if launch.capability >= 89 else dtype
    keys = int8_keys.Quantized(
        empty(batch, heads, rows, width, dtype=torch.int8),
        empty(batch, heads, width, rows, dtype=values),
        *(empty(batch, heads, groups) for _ in range(2)),
        empty(batch, heads, head_dim),
    )
    return tokens(head_dim, dtype), keys


def int8_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The attention kernel in eight bits."""
    x, keys = int8_keys_of(launch, head_dim, dtype)
    call = (x, keys, x, empty(*_SHAPE), table(launch.block, launch.tile), launch)
    if launch.specialized:
        return int8_hopper._int8_attention_hopper_fwd_kernel, int8_hopper.forward(*call)[1]
    return int8._int8_attention_fwd_kernel, int8.forward(*call)[1]


def int8_quantize_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel that quantises keys and values."""
    x, keys = int8_keys_of(launch, head_dim, dtype)
    return int8_keys._int8_quantize_fwd_kernel, int8_keys.quantize_arguments(x, x, keys)


def linear_states(launch: Launch, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """States of the blocks of a row of the launch table, h and z."""
    blocks = block_count(_SHAPE[2], launch.block)
    return states.unpack(empty(*_SHAPE[:2], blocks, head_dim * (head_dim + 1), dtype=dtype))


def state_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel of the state of linear attention over all keys."""
    state, total = empty(1, 12, 21, head_dim, head_dim), empty(1, 12, 21, head_dim)
    return _state(launch, tokens(head_dim, dtype), state, total, span=1600)


def project_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel that sums the states of spans and projects them."""
    state, total = empty(1, 12, 21, head_dim, head_dim), empty(1, 12, 21, head_dim)
    return states._linear_project_fwd_kernel, {
        "states": state, "totals": total, "weight": state, "state": state.to(dtype),
        "total": total, "n_spans": 21, "d": head_dim, "ROWS": launch.tile,
        "BLOCK_D": 1 << (head_dim - 1).bit_length(), "PRECISION": launch.precision,
    }  # fmt: skip


def block_state_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The same kernel for the projected states of blocks."""
    weight = empty(head_dim, head_dim, dtype=dtype)
    both = linear_states(launch, head_dim, dtype)
    return _state(launch, tokens(head_dim, dtype), *both, span=launch.block, weight=weight)


def _state(
    launch: Launch, x: Tensor, *both: Tensor, **options: object
) -> tuple[JITFunction, dict[str, object]]:
    _, arguments, _ = states.state_case(x, x, *both, launch=launch, **options)
    return states._linear_state_fwd_kernel, arguments


def linear_case(
    launch: Launch, head_dim: int, dtype: torch.dtype
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel that adds the linear branch, with a state for each block."""
    x, (state, total) = tokens(head_dim, dtype), linear_states(launch, head_dim, dtype)
    tensors = {"base": x, "q": x, "o": x, "bias": None, "eps": empty(*state.shape[:3])}
    tensors |= {"state": state, "total": total}
    _, arguments, _ = linear.branch_case(tensors, launch.block, launch)
    return linear._linear_branch_fwd_kernel, arguments


def linear_backward_case(
    launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = ""
) -> tuple[JITFunction, dict[str, object]]:
    """The kernel of dq or, extra "keys", of dk and dv, with a state for each block."""
    x, (state, total) = tokens(head_dim, dtype), linear_states(launch, head_dim, dtype)
    rows, center = empty(*_SHAPE), empty(*_SHAPE[:2], head_dim)
    if extra:
        tensors = {"k": x, "v": x, "dk": x, "dv": x, "center": center}
        tensors |= {"grad_state": state, "grad_total": total}
        _, arguments, _ = linear_backward.dkdv_case(tensors, launch.block, launch)
        return linear_backward._linear_branch_bwd_dkdv_kernel, arguments
    tensors = {"q": x, "do": x, "dq": x, "state": state, "total": total, "eps": total[..., 0]}
    tensors |= {"center": center, "ratio": rows, "delta": rows}
    _, arguments, _ = linear_backward.dq_case(tensors, launch.block, launch)
    return linear_backward._linear_branch_bwd_dq_kernel, arguments


CASES: dict[str, Callable[..., tuple[JITFunction, dict[str, object]]]] = {
    "forward": forward_case,
    "dq": dq_case,
    "dkdv": dkdv_case,
    "pool": pool_case,
    "means": means_case,
    "spreads": means_case,
    "parts": partial(means_case, extra="parts"),
    "scores": scores_case,
    "levels": levels_case,
    "select": select_case,
    "coefficients": coefficients_case,
    "state": state_case,
    "project": project_case,
    "block_state": block_state_case,
    "linear": linear_case,
    "linear_backward": linear_backward_case,
    "int8": int8_case,
    "int8_quantize": int8_quantize_case,
    **aot_ragged.CASES,
}


def compile_row(launch: Launch, head_dim: int | None = None, **extra: str) -> Report:
    """Compile the kernel of a row of the launch table, by default for its own head dimension."""
    head_dim = head_dim or launch.head_dim
    kernel, arguments = CASES[launch.op](launch, head_dim, torch.bfloat16, **extra)
    options = compiler_options(launch)
    options |= {"maxnreg": arguments["maxnreg"]} if "maxnreg" in arguments else {}
    return report(kernel, arguments, launch.capability, options)


def _serves(row: Launch, head_dim: int) -> bool:
    """Whether the plain kernel takes this row for heads so wide."""
    return find(row.op, row.capability, head_dim, row.block, specialized=False) is row


def cases(wanted: set[str]) -> Iterator[tuple[Launch, int, dict[str, str]]]:
    """Rows, head dimensions and extras of `op@capability` in wanted; of every row if it is empty.

    The op "forward+" is the forward kernel with the narrower heads and the extras, "hopper" the
    candidates of its specialized form, "hopper+" those with the extras and heads of 64; "int8+" is
    the candidates of the specialized form in eight bits, with heads of 128 and 64.
    """
    for row in int8_hopper.CANDIDATES:
        if "int8+@90" in wanted:
            yield row, 128, {}
            yield row, 64, {}
    for row in hopper.CANDIDATES:
        if "hopper@90" in wanted:
            yield row, 128, {}
        if "hopper+@90" in wanted:
            yield row, 128, {"extra": "pool"}
            yield row, 128, {"extra": "rectify"}
            yield row, 64, {}
            if row.block == 128:
                yield row, 128, {"extra": "linear"}
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
        if row.op == "dq" and (not wanted or "dq+" + place in wanted):
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
