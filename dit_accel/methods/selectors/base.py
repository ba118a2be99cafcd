"""What a selector is: a frozen dataclass that says which key blocks each query block reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from dit_accel import ops
from dit_accel.table import BlockMeans, BlockTable

if TYPE_CHECKING:
    from dit_accel.methods.base import Call

Chosen = tuple[BlockTable, BlockMeans | None]


@dataclass(frozen=True)
class Selector:
    """Base of all selectors. Its text, such as "sub" or "sub(8)", is what `find` reads."""

    name: ClassVar[str]
    description: ClassVar[str]
    paper: ClassVar[str] = ""

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: object
    ) -> Chosen:
        """The table of q [B, H, N_q, D] and k [B, H, N_k, D], and the means that were read for it.

        sizes: tokens in a query and in a key block. rules: mass, near, max_near, return_means and
        spreads of ops.block_table.
        """
        raise TypeError(f"{type(self).__name__} chooses nothing")

    def __str__(self) -> str:
        values = [getattr(self, f.name) for f in fields(self)]
        changed = [x for x, f in zip(values, fields(self), strict=True) if x != f.default]
        return f"{self.name}({','.join(map(str, values))})" if changed else self.name


@dataclass(frozen=True)
class Scored(Selector):
    """A selector that gives scores: all others of ops.choose_blocks is done here."""

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """[B, H, Mq, Mk], the higher the better."""
        raise TypeError(f"{type(self).__name__} gives no scores")

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any
    ) -> Chosen:
        """The best blocks by `scores`; block means are not made."""
        kept = {name: x for name, x in rules.items() if name not in ("return_means", "spreads")}
        scores = self.scores(q, k, call, sizes)
        kept |= {"block_q": sizes[0], "block_k": sizes[1], **valid(call)}
        return ops.choose_blocks(scores, call.keep, q.shape[2], k.shape[2], **kept), None


def chosen(q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any) -> Chosen:
    """ops.block_table of this call, and the means where the rules have return_means."""
    rules |= {"block_q": sizes[0], "block_k": sizes[1], "scale": call.scale, **valid(call)}
    if rules.pop("return_means", False):
        return ops.block_table(q, k, call.keep, return_means=True, **rules)
    return ops.block_table(q, k, call.keep, **rules), None


def valid(call: Call) -> dict[str, object]:
    """What ops.block_table is told of this call's text and padding."""
    return {"forced": call.forced, "max_forced": call.n_forced, "kv_len": call.kv_len}
