"""Static controls: which blocks are read depends on where they stand in the sequence, not on what
is in them. A scored selector has to beat them.

Each fills up with the nearest blocks what its pattern leaves of `keep`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dit_accel.machine import cached_tensors
from dit_accel.methods.selectors.base import Scored
from dit_accel.methods.selectors.near import first_key, own_blocks
from dit_accel.table import Keep, block_count, kept_blocks

if TYPE_CHECKING:
    from dit_accel.methods.base import Call

Place = tuple[int, int, int, int, int]  # queries, keys, their blocks, the first query's place


@dataclass(frozen=True)
class Static(Scored):
    """Scores of a pattern: its own blocks before all others, the nearest first."""

    def pattern(self, place: Place, kept: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
        """bool [1 or H, Mq, Mk] on the CPU. kept: the blocks of a row of each head, or of all.
        heads: their numbers in the model."""
        raise TypeError(f"{type(self).__name__} has no pattern")

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """[B, H, Mq, Mk]."""
        n_k = call.kv_len if isinstance(call.kv_len, int) else k.shape[2]
        live = block_count(n_k, sizes[1])
        heads = call.heads or tuple(range(q.shape[1]))
        place = (q.shape[2], k.shape[2], *sizes, first_key(q, k, call))
        found = _scores(self, place, call.keep, live, heads, q.device)
        return found.expand(*q.shape[:2], -1, -1)


@cached_tensors(16)
def _scores(
    pattern: Static,
    place: Place,
    keep: Keep,
    live: int,
    heads: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """float32 [1 or H, Mq, Mk]: minus the distance, above that of all others inside the pattern."""
    kept = tuple(kept_blocks(x, live) for x in (keep if isinstance(keep, tuple) else (keep,)))
    far, low = distance(place), own_blocks(place[0], *place[2:])[0]
    before = torch.arange(far.shape[1], device="cpu") < low  # of two as far, the one before
    inside = pattern.pattern(place, kept, heads)
    return (inside * (4 * far.shape[1]) - 2 * far + before.int()).float().to(device)


def distance(place: Place) -> Tensor:
    """int64 [Mq, Mk]: key blocks from those that hold a query block's own tokens."""
    n_q, n_k, block_q, block_k, first = place
    low, high = own_blocks(n_q, block_q, block_k, first)
    block = torch.arange(block_count(n_k, block_k), device="cpu")
    return torch.maximum(low - block, block - high).clamp(min=0)


@dataclass(frozen=True)
class Power(Static):
    """Blocks at distances of 0, 1, 2, 4, 8 …, the nearest first: after log₂ M layers every block
    has reached every other one."""

    name: ClassVar[str] = "power"
    description: ClassVar[str] = "blocks at distances of powers of two: a static control"
    paper: ClassVar[str] = "arXiv 2503.03588 (PowerAttention)"

    def pattern(self, place: Place, kept: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
        far = distance(place)
        return (far & (far - 1))[None] == 0  # a power of two has one bit; 0 & −1 is 0


@dataclass(frozen=True)
class Shards(Static):
    """The `local` nearest blocks, and of all others those with (m + h) mod stride = 0: each head h
    another shard, and as many heads as the stride have read everything; stride = M / (K − local)
    for K kept of M blocks.

    Args:
        local: blocks around the query's own that every head reads, ≥ 1.

    Raises ValueError for none.
    """

    local: int = 1

    name: ClassVar[str] = "shards"
    description: ClassVar[str] = "a strided shard for each head: a static control"
    paper: ClassVar[str] = "arXiv 2407.17678 (S2-Attention)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local < 1:
            raise ValueError(f"shards has at least one local block, not {self.local}")

    def pattern(self, place: Place, kept: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
        far = distance(place)
        near, block = far <= self.local // 2, torch.arange(far.shape[1], device="cpu")
        rows = []
        for i, head in enumerate(heads):
            stride = -(-len(block) // max(1, kept[i % len(kept)] - self.local))
            rows.append(near | ((block + head) % stride == 0))
        return torch.stack(rows)


@dataclass(frozen=True)
class Axes(Static):
    """Half of what is kept is the block's own stretch of the sequence, half a dilated grid, every
    G-th block from its own: two layers reach every block from 2·√M kept of M on."""

    name: ClassVar[str] = "axes"
    description: ClassVar[str] = "an own window and a dilated grid: a static control"
    paper: ClassVar[str] = "arXiv 2204.01697 (MaxViT)"

    def pattern(self, place: Place, kept: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
        n_q, n_k, block_q, block_k, first = place
        own = own_blocks(n_q, block_q, block_k, first)[0]
        block = torch.arange(block_count(n_k, block_k), device="cpu")
        rows = []
        for count in kept:
            window = (count + 1) // 2
            dilation = -(-len(block) // max(1, count - window + 1))
            same = block // window == own // window
            rows.append(same | (block % dilation == own % dilation))
        return torch.stack(rows)
