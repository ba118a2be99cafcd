"""Launch parameters of the Triton kernels: a frozen table, each row saying how it was found.

There is no run-time autotuning: an autotuned kernel cannot run in Triton's interpreter, and its
first call stalls a pipeline. A row serves its capability and every newer one without a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from triton import JITFunction


HEAD_DIMS = (64, 80, 96, 128)
BLOCKS = (16, 32, 64, 128)
_AOT = "not measured: no spill in the ahead-of-time report"
_H100 = "fastest of a sweep on an H100: benchmarks/results/h100-sweeps.json"
_GLUON = "fastest of a sweep on an H100: benchmarks/results/h100-gluon-2.json"
_MEANS = "fastest of a sweep on an H100: benchmarks/results/h100-table-parts-3.json"
_STATES = "fastest of a sweep on an H100: benchmarks/results/h100-kernels-5.json"
_LANES = "faster than the plain row on an H200: benchmarks/results/h200-gluon-64-2.json"
_BACKWARD = "fastest of a sweep on an H200: benchmarks/results/h200-backward.json"
_BACKWARD_64 = "faster than the plain row on an H200: benchmarks/results/h200-backward-2.json"
_LEVELS = "fastest of a sweep on an H200: benchmarks/results/h200-select-2.json"
_ROPE = "fastest of a sweep on an H200: benchmarks/results/h200-norm-rope.json"
_INT8 = "fastest of a sweep on an H100: benchmarks/results/h100-int8.json"
_INT8_GLUON = "fastest of a sweep on an H200: benchmarks/results/h200-int8.json"


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched on one GPU for one kind of input.

    Args:
        op: the kernel.
        capability: compute capability times ten; 90 is Hopper.
        head_dim: the widest head served.
        block: the widest block of a program served: of queries, for dkdv of keys; of norm_rope the
            heads of a token.
        tile: keys (for dkdv queries) per step, at most one block of the table; of means the columns
            of a program, of norm_rope its channels / 16.
        warps, stages: Triton's num_warps and software pipelining depth.
        descriptors: load keys and values by tensor descriptors (TMA) instead of pointers.
        specialized: the "forward" of Hopper whose warps have roles, where it serves the call.
        pairs: a tile of a specialized kernel is two groups of 64 keys, perhaps of two blocks.
        counter: the programs of a specialized forward take the next row of a counter instead of
            every p-th, where that gains.
        precision: of float32 products, "bf16x3" in three of bfloat16; half-width inputs always
            multiply exactly.
        bits: width of the input's dtype.
        lazy: of "forward": rescale the sums only where a maximum grew by more, in powers of two;
            0: at every step.
        provenance: the evidence for the row.
    """

    op: str
    capability: int
    head_dim: int
    block: int
    tile: int
    warps: int
    stages: int
    descriptors: bool = False
    specialized: bool = False
    pairs: bool = False
    counter: bool = False
    precision: str = "ieee"
    bits: int = 16
    lazy: float = 0.0
    provenance: str = _AOT

    def __post_init__(self) -> None:
        if (
            self.block not in BLOCKS
            or self.tile not in BLOCKS
            or self.warps not in (1, 2, 4, 8, 16)
        ):
            raise ValueError(
                f"a launch has blocks and tiles of {BLOCKS} and a power of two of warps, not {self}"
            )
        if self.lazy < 0 or (self.lazy and (self.specialized or self.op != "forward")):
            raise ValueError(
                f"only the plain forward kernel rescales lazily, by a growth > 0, not {self}"
            )


_specialized = partial(Launch, descriptors=True, specialized=True)
# Unequal heads gain 6 to 15 %, unequal rows 8 to 13: benchmarks/results/h200-gluon-counter-2.json
_counted = partial(_specialized, counter=True)

# op, capability, head_dim, block, tile
LAUNCHES: tuple[Launch, ...] = (
    Launch("forward", 80, 64, 64, 64, warps=4, stages=3),
    Launch("forward", 80, 64, 128, 64, warps=8, stages=3),
    Launch("forward", 80, 96, 64, 32, warps=4, stages=3),
    Launch("forward", 80, 128, 64, 64, warps=4, stages=3),
    Launch("forward", 80, 128, 128, 32, warps=8, stages=3),
    Launch("forward", 90, 64, 64, 64, warps=4, stages=3, descriptors=True),
    Launch("forward", 90, 64, 128, 64, warps=4, stages=4, descriptors=True, provenance=_H100),
    _counted("forward", 90, 64, 128, 128, warps=4, stages=2, pairs=True, provenance=_GLUON),
    Launch("forward", 90, 128, 64, 64, warps=4, stages=2, descriptors=True, provenance=_H100),
    _counted("forward", 90, 128, 64, 64, warps=4, stages=2, provenance=_LANES),
    Launch("forward", 90, 128, 128, 64, warps=4, stages=2, descriptors=True, provenance=_H100),
    _counted("forward", 90, 128, 128, 128, warps=4, stages=2, pairs=True, provenance=_GLUON),
    Launch("forward", 100, 128, 64, 64, warps=8, stages=3, descriptors=True),
    Launch("forward", 100, 128, 128, 64, warps=8, stages=3, descriptors=True),
    Launch("forward", 120, 128, 64, 32, warps=4, stages=2),
    Launch("forward", 120, 128, 128, 16, warps=8, stages=2),
    Launch("dq", 80, 128, 64, 64, warps=4, stages=2),
    Launch("dq", 80, 128, 128, 16, warps=8, stages=2),
    Launch("dq", 90, 64, 64, 64, warps=4, stages=2),
    Launch("dq", 90, 128, 64, 64, warps=4, stages=2, provenance=_H100),
    Launch("dq", 90, 128, 128, 64, warps=8, stages=2, provenance=_H100),
    _specialized("dq", 90, 128, 64, 64, warps=4, stages=2, provenance=_BACKWARD_64),
    _specialized("dq", 90, 128, 128, 64, warps=4, stages=3, provenance=_BACKWARD),
    Launch("dq", 120, 128, 64, 32, warps=4, stages=2),
    Launch("dq", 120, 128, 128, 16, warps=8, stages=2),
    Launch("dkdv", 80, 128, 64, 32, warps=8, stages=2),
    Launch("dkdv", 80, 128, 128, 16, warps=8, stages=2),
    Launch("dkdv", 90, 128, 64, 64, warps=4, stages=2, provenance=_H100),
    Launch("dkdv", 90, 128, 128, 64, warps=8, stages=2, provenance=_H100),
    _specialized("dkdv", 90, 128, 64, 64, warps=4, stages=2, provenance=_BACKWARD),
    _specialized("dkdv", 90, 128, 128, 64, warps=4, stages=3, provenance=_BACKWARD),
    Launch("dkdv", 120, 128, 64, 32, warps=8, stages=2),
    Launch("dkdv", 120, 128, 128, 16, warps=8, stages=2),
    _specialized("gradients", 90, 128, 128, 64, warps=4, stages=2, provenance=_BACKWARD),
    Launch("ragged", 80, 128, 64, 64, warps=4, stages=3),
    Launch("ragged", 80, 128, 128, 32, warps=8, stages=3),
    Launch("ragged", 90, 128, 64, 64, warps=4, stages=2),
    Launch("ragged", 90, 128, 128, 64, warps=8, stages=2),
    Launch("ragged", 120, 128, 64, 32, warps=4, stages=2),
    Launch("ragged", 120, 128, 128, 16, warps=8, stages=2),
    Launch("ragged_dq", 80, 128, 64, 32, warps=4, stages=2),
    Launch("ragged_dq", 80, 128, 128, 16, warps=8, stages=2),
    Launch("ragged_dkdv", 80, 128, 64, 32, warps=8, stages=2),
    Launch("ragged_dkdv", 80, 128, 128, 16, warps=8, stages=2),
    Launch("pool", 80, 128, 64, 32, warps=8, stages=2),
    Launch("pool", 80, 128, 128, 16, warps=8, stages=1),
    Launch("means", 80, 128, 128, 128, warps=2, stages=1, provenance=_MEANS),
    Launch("parts", 80, 128, 128, 64, warps=1, stages=1),
    Launch("spreads", 80, 128, 128, 32, warps=1, stages=1),
    Launch("spreads", 90, 128, 128, 64, warps=1, stages=1, provenance=_MEANS),
    Launch("scores", 80, 128, 128, 64, warps=4, stages=2, precision="bf16x3"),
    Launch("levels", 80, 128, 128, 64, warps=8, stages=2),
    Launch("levels", 90, 128, 128, 64, warps=4, stages=3, provenance=_LEVELS),
    Launch("coefficients", 80, 128, 128, 32, warps=8, stages=2),
    Launch("coefficients", 90, 128, 128, 32, warps=4, stages=2),
    Launch("coefficients", 100, 128, 128, 32, warps=4, stages=2),
    Launch("coefficients", 120, 128, 128, 16, warps=8, stages=2),
    Launch("rows", 80, 128, 128, 16, warps=4, stages=1),
    Launch("state", 80, 128, 128, 32, warps=8, stages=2),
    Launch("state", 90, 128, 128, 32, warps=8, stages=4, provenance=_STATES),
    Launch("state", 100, 128, 128, 64, warps=8, stages=2),
    Launch("project", 80, 128, 128, 16, warps=8, stages=1, precision="tf32x3"),
    Launch("block_state", 80, 128, 128, 32, warps=8, stages=2),
    Launch("linear", 80, 128, 128, 64, warps=8, stages=1),
    Launch("linear_backward", 80, 128, 128, 64, warps=8, stages=1),
    Launch("int8", 80, 128, 64, 32, warps=8, stages=2),
    Launch("int8", 80, 128, 128, 32, warps=8, stages=2),
    Launch("int8", 89, 128, 64, 32, warps=8, stages=2),
    Launch("int8", 89, 128, 128, 32, warps=8, stages=2),
    Launch("int8", 90, 128, 64, 64, warps=4, stages=3, descriptors=True, provenance=_INT8),
    Launch("int8", 90, 128, 128, 64, warps=8, stages=3, descriptors=True, provenance=_INT8),
    _specialized("int8", 90, 128, 128, 64, warps=4, stages=4, provenance=_INT8_GLUON),
    Launch("int8", 100, 128, 64, 64, warps=4, stages=2, descriptors=True),
    Launch("int8", 100, 128, 128, 64, warps=8, stages=2, descriptors=True),
    Launch("int8", 120, 128, 64, 32, warps=8, stages=2),
    Launch("int8", 120, 128, 128, 32, warps=8, stages=2),
    Launch("norm_rope", 80, 128, 16, 128, warps=2, stages=1, provenance=_ROPE),
    Launch("norm_rope", 80, 128, 128, 64, warps=8, stages=1, provenance=_ROPE),
    Launch("int8_mean", 80, 128, 128, 64, warps=4, stages=1),
    Launch("int8_quantize", 80, 128, 128, 64, warps=4, stages=1),
)


def capability_of(tensor: torch.Tensor) -> int:
    """Compute capability times ten of the tensor's GPU; 90 on the interpreter's CPU."""
    return 90 if tensor.device.type != "cuda" else _capability(tensor.device.index)


@cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def unsupported(q: torch.Tensor, block_q: int, block_k: int) -> str | None:
    """Why no kernel of the table serves queries like q with these blocks, or None."""
    if old := too_old(q):
        return old
    if q.device.type == "cuda" and q.dtype not in (torch.float16, torch.bfloat16):
        return f"it has float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"it has head dimensions {HEAD_DIMS}, not {q.shape[-1]}"
    if block_q not in BLOCKS or block_k not in BLOCKS:
        return f"it has blocks of {BLOCKS} tokens, not {block_q} and {block_k}"
    return None


def too_old(x: torch.Tensor) -> str | None:
    """Why no kernel runs on the GPU of x, or None."""
    if x.device.type == "cuda" and capability_of(x) < 80:
        return f"it needs compute capability 8.0 or newer, not {capability_of(x) / 10}"
    return None


@cache
def find(op: str, capability: int, head_dim: int, block: int, specialized: bool = True) -> Launch:
    """The row for an op, GPU, head dimension and block: newest GPU first, then the closest fit,
    then a specialized one, unless that is False.

    Raises RuntimeError when the table has none.
    """
    rows = [
        row
        for row in LAUNCHES
        if row.op == op
        and row.capability <= capability
        and row.head_dim >= head_dim
        and row.block >= block
        and row.specialized <= specialized
    ]
    if not rows:
        raise RuntimeError(
            f"the launch table has no row for {op} on sm_{capability} with head dimension "
            f"{head_dim} and blocks of {block}; set DIT_ACCEL_KERNELS=torch"
        )
    return min(
        rows, key=lambda row: (-row.capability, row.head_dim, row.block, not row.specialized)
    )


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """The head dimension as one or two powers of two: 80 is 64 + 16, 128 is 128 + 0."""
    first = 1 << (head_dim.bit_length() - 1)
    return first, head_dim - first


def padded(n: int) -> int:
    """The next power of two: Triton's own function costs a launch's time in Python."""
    return 1 << (n - 1).bit_length()


def compiler_options(launch: Launch) -> dict[str, int]:
    """What a row tells Triton's compiler. Products and differences are not fused: s·scale − m with
    one rounding passes exp2's range where the logits are large, and the output is not finite."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return options | {"enable_fp_fusion": False}


def run(
    kernel: JITFunction, grid: tuple[int, ...], arguments: Mapping[str, object], launch: Launch
) -> None:
    """Launch a Triton kernel on the GPU of its tensors."""
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](**arguments, **compiler_options(launch))
