"""Launch parameters of the Triton kernels: a frozen table, each row saying how it was found.

There is no run-time autotuning: an autotuned kernel cannot run in Triton's interpreter, and its first call stalls
a pipeline. A row serves its capability and every newer one that has no row of its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

HEAD_DIMS = (64, 80, 96, 128)
BLOCKS = (16, 32, 64, 128)
_AOT = "not measured: chosen from the ahead-of-time compilation report"


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched for one kind of input.

    capability: compute capability times ten (90 = Hopper).  op: the kernel.  head_dim: the widest head served.
    bits: width of the input's dtype.  block: the widest query block (key block for dkdv) served.  tile: keys (queries for dkdv) per step,
    at most one table block.  descriptors: load K and V by tensor descriptors (TMA) instead of pointers.
    provenance: the evidence for the row.
    """

    op: str
    capability: int
    head_dim: int
    bits: int
    block: int
    tile: int
    warps: int
    stages: int
    descriptors: bool = False
    precision: str = "ieee"
    provenance: str = _AOT

    def __post_init__(self) -> None:
        if self.bits not in (16, 32) or self.block not in BLOCKS or self.tile not in BLOCKS:
            raise ValueError(
                f"expected 16 or 32 bits and blocks in {BLOCKS}, got {self}; correct the row of the launch table"
            )


LAUNCHES: tuple[Launch, ...] = (
    Launch("forward", 80, 64, 16, 64, 64, 4, 3),
    Launch("forward", 80, 64, 16, 128, 64, 4, 3),
    Launch("forward", 80, 128, 16, 64, 64, 4, 3),
    Launch("forward", 80, 128, 16, 128, 64, 8, 3),
    Launch("forward", 80, 128, 32, 128, 32, 8, 2),
    Launch("forward", 90, 64, 16, 64, 64, 4, 3, descriptors=True),
    Launch("forward", 90, 64, 16, 128, 64, 4, 3, descriptors=True),
    Launch("forward", 90, 128, 16, 64, 64, 4, 3, descriptors=True),
    Launch("forward", 90, 128, 16, 128, 64, 8, 3, descriptors=True),
    Launch("forward", 90, 128, 32, 128, 32, 8, 2),
    Launch("means", 80, 128, 16, 128, 16, 4, 1),
    Launch("means", 80, 128, 32, 128, 16, 4, 1),
    Launch("scores", 80, 128, 32, 128, 64, 4, 1, precision="tf32x3"),
)


def capability_of(tensor: torch.Tensor) -> int:
    """Compute capability times ten of the tensor's GPU; 90 for the interpreter's CPU tensors."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def find(op: str, capability: int, head_dim: int, dtype: torch.dtype, block: int) -> Launch:
    """The row for an op, GPU, head dimension, dtype and block size.

    Raises RuntimeError when the table has none, naming what was asked for.
    """
    bits = 32 if dtype == torch.float32 else 16
    rows = [
        row
        for row in LAUNCHES
        if row.op == op
        and row.bits == bits
        and row.capability <= capability
        and row.head_dim >= head_dim
        and row.block >= block
    ]
    if not rows:
        raise RuntimeError(
            f"expected a launch row for {op} on sm_{capability} with head_dim {head_dim}, {dtype} and blocks of {block}, "
            f"got none; use DIT_ACCEL_KERNELS=torch"
        )
    return min(rows, key=lambda row: (-row.capability, row.head_dim, row.block))


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """The head dimension as one or two powers of two: 80 is 64 + 16, 128 is 128 + 0."""
    first = 1 << (head_dim.bit_length() - 1)
    return first, head_dim - first


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], launch: Launch) -> None:
    """Launch a Triton kernel on the GPU of its tensors."""
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=launch.warps, num_stages=launch.stages)
