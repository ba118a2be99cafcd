"""What a selector is: a frozen dataclass that says which key blocks each query block reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.selectors.near import Near
from dit_accel.methods.trained import Trained
from dit_accel.table import BlockMeans, BlockTable, block_count

if TYPE_CHECKING:
    from dit_accel.methods.base import Call

Chosen = tuple[BlockTable, BlockMeans | None]


@dataclass(frozen=True)
class Selector(Trained):
    """Base of all selectors. Its text, such as "sub" or "sub(8)", is what `find` reads.

    Raises ValueError for a value that is not of its field's type.
    """

    @property
    def placed(self) -> bool:
        """Does it look where blocks lie in the picture? Then it needs all tokens of the grid."""
        return False

    @property
    def reads_values(self) -> bool:
        """Does it look at `Call.values`?"""
        return False

    @property
    def counted(self) -> bool:
        """Does it read as many blocks as `keep` says?"""
        return True

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from."""
        return ()

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any
    ) -> Chosen:
        """The table of q [B, H, N_q, D] and k [B, H, N_k, D], and the means that were read for it.

        sizes: tokens in a query and in a key block. rules: mass, near, max_near, return_means and
        spreads of ops.block_table.
        """
        raise TypeError(f"{type(self).__name__} chooses nothing")


@dataclass(frozen=True)
class Scored(Selector):
    """A selector that gives scores: all others of ops.choose_blocks is done here.

    shares: the scores are shares of the attention. Where they are not, the blocks that hold a
    `mass` are found by their means, and read besides.
    """

    shares: ClassVar[bool] = False

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """[B, H, Mq, Mk], the higher the better."""
        raise TypeError(f"{type(self).__name__} gives no scores")

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any
    ) -> Chosen:
        """The best blocks by `scores`; block means are not made."""
        kept = {name: x for name, x in rules.items() if name not in ("return_means", "spreads")}
        mass = 0.0 if self.shares else kept.pop("mass", 0.0)
        scores = self.scores(q, k, call, sizes)
        kept |= {"block_q": sizes[0], "block_k": sizes[1], **valid(call)}
        table = ops.choose_blocks(scores, call.keep, q.shape[2], k.shape[2], **kept)
        return with_mass(table, q, k, call, sizes, mass), None


@dataclass(frozen=True)
class Fixed(Selector):
    """A selector that reads the same blocks whatever the tokens are, and as many as there are: its
    table is a mask, with the text."""

    @property
    def counted(self) -> bool:
        return False

    def mask(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Near:
        """The blocks, on the device of q."""
        raise TypeError(f"{type(self).__name__} has no mask")

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any
    ) -> Chosen:
        """The blocks of `mask`, those near, and the text."""
        (mask, width), (n_q, n_k) = self.mask(q, k, call, sizes), (q.shape[2], k.shape[2])
        blocks = block_count(n_k, sizes[1])
        if rules.get("near") is not None:
            mask, width = mask | rules["near"], width + rules.get("max_near", 0)
        mask = mask[None, None]
        if call.forced is not None:
            mask, width = mask | call.forced, width + call.n_forced
        if call.kv_len is not None:
            held = (torch.as_tensor(call.kv_len, device=q.device) + sizes[1] - 1) // sizes[1]
            at = torch.arange(blocks, device=q.device)
            mask = mask & (at < held.reshape(-1, 1, 1, 1))
        rows = BlockTable.from_mask(mask, *sizes, n_q, n_k, max(1, min(width, blocks)))
        table = expanded(rows, *q.shape[:2])
        return with_mass(table, q, k, call, sizes, rules.get("mass", 0.0)), None


def expanded(rows: BlockTable, batch: int, heads: int) -> BlockTable:
    """`rows` of one head, or one sample, for all of them."""
    shape = (batch, heads, -1, -1)
    indices = rows.indices.expand(shape).contiguous()
    counts = rows.counts.expand(shape[:3]).contiguous()
    return replace(rows, indices=indices, counts=counts, bits=None)


def with_mass(
    table: BlockTable, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], mass: float
) -> BlockTable:
    """`table`, and as many of the best blocks by their means as hold this share of attention."""
    if not mass:
        return table
    one = replace(call, keep=1e-9)  # a block is the least that is chosen
    return table.union(chosen(q, k, one, sizes, mass=mass)[0])


def chosen(q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any) -> Chosen:
    """ops.block_table of this call, and the means where the rules have return_means."""
    rules |= {"block_q": sizes[0], "block_k": sizes[1], "scale": call.scale, **valid(call)}
    if rules.pop("return_means", False):
        return ops.block_table(q, k, call.keep, return_means=True, **rules)
    return ops.block_table(q, k, call.keep, **rules), None


def valid(call: Call) -> dict[str, object]:
    """What ops.block_table is told of this call's text and padding."""
    return {"forced": call.forced, "max_forced": call.n_forced, "kv_len": call.kv_len}
