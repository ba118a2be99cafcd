"""The kernels of linear attention's states and branch for a 480p video, on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel.kernels.aot_inputs import SHAPE, Case, empty, tokens
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.sparse_linear_attention import states
from dit_accel.kernels.sparse_linear_attention import triton as linear
from dit_accel.kernels.sparse_linear_attention import triton_backward as linear_backward
from dit_accel.table import block_count


def linear_states(launch: Launch, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """States of the blocks of a row of the launch table, h and z."""
    blocks = block_count(SHAPE[2], launch.block)
    return states.unpack(empty(*SHAPE[:2], blocks, head_dim * (head_dim + 1), dtype=dtype))


def state_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The kernel of the state of linear attention over all keys."""
    state, total = empty(1, 12, 21, head_dim, head_dim), empty(1, 12, 21, head_dim)
    return _state(launch, tokens(head_dim, dtype), (state, total), 1600)


def project_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The kernel that sums the states of spans and projects them."""
    state, total = empty(1, 12, 21, head_dim, head_dim), empty(1, 12, 21, head_dim)
    return states._linear_project_fwd_kernel, {
        "states": state, "totals": total, "weight": state, "state": state.to(dtype),
        "total": total, "n_spans": 21, "d": head_dim, "ROWS": launch.tile,
        "BLOCK_D": 1 << (head_dim - 1).bit_length(), "PRECISION": launch.precision,
    }  # fmt: skip


def block_state_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The same kernel for the projected states of blocks."""
    weight = empty(head_dim, head_dim, dtype=dtype)
    both = linear_states(launch, head_dim, dtype)
    return _state(launch, tokens(head_dim, dtype), both, launch.block, weight)


def _state(
    launch: Launch, x: Tensor, both: tuple[Tensor, Tensor], span: int, weight: Tensor | None = None
) -> Case:
    _, arguments, _ = states.state_case(x, x, *both, span, launch, weight=weight)
    return states._linear_state_fwd_kernel, arguments


def linear_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The kernel that adds the linear branch, with a state for each block."""
    x, (state, total) = tokens(head_dim, dtype), linear_states(launch, head_dim, dtype)
    tensors = {"base": x, "q": x, "o": x, "bias": None, "eps": empty(*state.shape[:3])}
    tensors |= {"state": state, "total": total}
    _, arguments, _ = linear.branch_case(tensors, launch.block, launch)
    return linear._linear_branch_fwd_kernel, arguments


def linear_backward_case(
    launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = ""
) -> Case:
    """The kernel of dq or, extra "keys", of dk and dv, with a state for each block."""
    x, (state, total) = tokens(head_dim, dtype), linear_states(launch, head_dim, dtype)
    rows, center = empty(*SHAPE), empty(*SHAPE[:2], head_dim)
    if extra:
        tensors = {"k": x, "v": x, "dk": x, "dv": x, "center": center}
        tensors |= {"grad_state": state, "grad_total": total}
        _, arguments, _ = linear_backward.dkdv_case(tensors, launch.block, launch)
        return linear_backward._linear_branch_bwd_dkdv_kernel, arguments
    tensors = {"q": x, "do": x, "dq": x, "state": state, "total": total, "eps": total[..., 0]}
    tensors |= {"center": center, "ratio": rows, "delta": rows}
    _, arguments, _ = linear_backward.dq_case(tensors, launch.block, launch)
    return linear_backward._linear_branch_bwd_dq_kernel, arguments


CASES: dict[str, Callable[..., Case]] = {
    "state": state_case,
    "project": project_case,
    "block_state": block_state_case,
    "linear": linear_case,
    "linear_backward": linear_backward_case,
}
