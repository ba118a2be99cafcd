"""What a method is: a frozen dataclass that turns q, k, v and the call's circumstances into O.

Every method has the form O = r·O_sparse + C: a selector gives the block table of O_sparse, a
compensation gives r and C for the blocks that were skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from dit_accel.inputs import fields
from dit_accel.methods import selectors
from dit_accel.methods.reuse import Reuse
from dit_accel.methods.selectors.base import Chosen, Selector
from dit_accel.methods.selectors.means import Means
from dit_accel.methods.sorts import Sort, check_sort, in_order
from dit_accel.methods.traits import Traits
from dit_accel.parallel.sharded import Ring
from dit_accel.table import BlockTable, Keep, block_count

_LONG = 8192


def check_rounding(rounding: str) -> None:
    """ValueError unless the number of kept blocks is rounded "up" or "down"."""
    if rounding not in ("up", "down"):
        raise ValueError(f"rounding of the kept blocks is 'up' or 'down', not {rounding!r}")


@dataclass
class Call:
    """The circumstances of one attention call.

    Args:
        keep: share of key blocks to keep, in (0, 1], or one for each head.
        scale: softmax scale; None is 1/√D.
        grid: (T, H, W) of the visual tokens, or None when unknown.
        forced: bool [Mk], key blocks every query reads (text), or None; `n_forced` of them.
        kv_len: number of valid keys (int, or int tensor [B]); None when all are valid.
        text_first: where keys hold more tokens than the grid, those come before the visual ones.
        index: int64 permutation of the visual tokens from raster order (CPU), or None for raster.
        layer, step, steps, passname: where in the run; steps is None when unknown.
        part: which of the pipeline's transformers this is, 0 or 1.
        layers: numbers of the model's layers that run sparse, this one among them.
        refresh: the schedule asks methods with a state to rebuild it now.
        stateless: this layer's state finds no room: keep nothing.
        state: this (pass, layer)'s own dictionary; emptied by a new generation or a new shape.
        together: the same of this layer in all passes.
        across: what layers of this transformer leave each other in this pass, by their numbers.
        note: takes the table that is read, for the report; None when everything is.
        gate: what `Method.gate` gave for these queries, [B, H, Nq, D]; None where it gave none.
        sections: lengths of the parts (text, references, sound) of the tokens beside the grid's;
            empty when unknown.
        first, queries: the visual queries given begin at `first` of `queries`; None: they are all.
        heads: numbers of the heads given among the model's; None: they are all.
        values: v, where the selector looks at it.
        sorted: the tokens of each head are in its own order, see Method.sort.
        ring: by which the keys of other processes come, where k and v are a part of them.
        dense: what computes dense attention of q, k, v [B, N, H, D] and a mask; None: PyTorch's.
        learned: the layer's trained tensors by name, where its selector has some.
    """

    keep: Keep
    scale: float | None = None
    grid: tuple[int, int, int] | None = None
    forced: torch.Tensor | None = None
    n_forced: int = 0
    kv_len: int | torch.Tensor | None = None
    text_first: bool = False
    index: torch.Tensor | None = None
    layer: int = 0
    part: int = 0
    layers: tuple[int, ...] = (0,)
    step: int = 0
    steps: int | None = None
    passname: str = ""
    refresh: bool = False
    stateless: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    together: dict[str, Any] = field(default_factory=dict)
    across: dict[Any, Any] = field(default_factory=dict)
    note: Callable[[BlockTable | None], None] = lambda table: None
    gate: torch.Tensor | None = None
    sections: tuple[int, ...] = ()
    first: int = 0
    queries: int | None = None
    heads: tuple[int, ...] | None = None
    values: torch.Tensor | None = None
    sorted: bool = False
    ring: Ring | None = None
    dense: Callable[..., torch.Tensor] | None = None
    learned: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Method(Traits):
    """Base of all methods.

    Args:
        keep: share of key blocks each query block reads, in (0, 1].
        block_q: queries that share their key blocks, 64 or 128; None: 128 from 8,192 queries on.
        block_k: tokens in a key block: 64 or 128.
        select: how blocks are chosen: a selector, or its text such as "sub".
        reuse: which calls share a table; a text such as "4+passes" is read.
        sort: the order in which each head reads its tokens: a `Sort`, or its text.

    Raises ValueError for a value outside its range.
    """

    keep: float = 0.25
    block_q: int | None = None
    block_k: int = 64
    select: Selector | str = field(default=Means(), kw_only=True)
    reuse: Reuse | str = field(default=Reuse(), kw_only=True)
    sort: Sort | str = field(default=Sort(), kw_only=True)

    def __post_init__(self) -> None:
        fields.check(self)
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"keep is the share of key blocks kept and lies in (0, 1], not {self.keep}; "
                "0.25 keeps a quarter"
            )
        if self.block_q not in (None, 64, 128):
            raise ValueError(f"block_q is 64 or 128 tokens or None, not {self.block_q}")
        if self.block_k not in (64, 128):
            raise ValueError(f"block_k is 64 or 128 tokens, not {self.block_k}")
        if isinstance(self.select, str):
            object.__setattr__(self, "select", selectors.find(self.select))
        if isinstance(self.reuse, str):
            object.__setattr__(self, "reuse", Reuse.read(self.reuse))
        if isinstance(self.sort, str):
            object.__setattr__(self, "sort", Sort.read(self.sort))
        if not self.chooses and (self.select != Means() or self.reuse != Reuse() or self.sort):
            raise ValueError(
                f"{self.name} has its own choice of blocks: no select, no reuse and no sort"
            )
        if self.sort:
            check_sort(self.sorting, self.selector, self.name, self.stateful or bool(self.sharing))

    def replaced(self, **changes: Any) -> Self:
        """A copy with other options."""
        return replace(self, **changes)

    @property
    def label(self) -> str:
        """Its name, with what chooses its blocks and when, where that is not the default."""
        selector = "" if self.select == Means() else f"/{self.select}"
        reuse = "" if self.reuse == Reuse() else f", reuse {self.reuse}"
        return self.name + selector + reuse + (f", sort {self.sort}" if self.sort else "")

    @property
    def selector(self) -> Selector:
        """How blocks are chosen, as an object."""
        return selectors.find(self.select) if isinstance(self.select, str) else self.select

    @property
    def runs_at_one(self) -> bool:
        """Does it run at keep = 1, too? A selector that `keep` is not for reads less anyway."""
        return self.always or (self.chooses and not self.selector.counted)

    @property
    def sharing(self) -> Reuse:
        """Which calls share a table, as an object."""
        return Reuse.read(self.reuse) if isinstance(self.reuse, str) else self.reuse

    @property
    def sorting(self) -> Sort:
        """The order of each head's tokens, as an object."""
        return Sort.read(self.sort) if isinstance(self.sort, str) else self.sort

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from: learned weights, and the files of selector and order."""
        weights = getattr(self, "weights", None)
        own = (Path(weights),) if isinstance(weights, str) else ()
        return (*own, *self.selector.files, *self.sorting.files)

    def sorts(self, call: Call) -> bool:
        """Are the tokens of this call still to be sorted?"""
        return bool(self.sort) and not call.sorted

    @property
    def serves_rows(self) -> bool:
        """Does it serve any whole query blocks by themselves?"""
        return self.by_rows and not self.sort

    def query_block(self, n: int) -> int:
        """Tokens in a query block of a call with n queries.

        Hopper's kernel runs 1.3 times as fast with 128, and in a long sequence these are still
        close neighbours.
        """
        return self.block_q or (128 if n >= _LONG else 64)

    def check(self, head_dim: int | None, layers: int) -> None:
        """Refuse (ValueError) a model this method cannot serve, before anything is patched.

        head_dim: None when the model does not tell. layers: attention layers of one transformer.
        """

    def state_bytes(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
        """Bytes kept for one layer in one guidance pass; shape of q (B, H, N, D), without text."""
        return 0

    def gate(self, hidden: torch.Tensor, place: tuple[int, int], heads: int) -> torch.Tensor | None:
        """[B, N, H, D] from the attention's input hidden [B, N, C], or None: Call.gate.

        place: transformer and layer. Called for methods that are `gated`, with a rank's own tokens
        where several share a sequence.
        """
        return None

    def table(
        self, q: torch.Tensor, k: torch.Tensor, call: Call, v: torch.Tensor | None = None
    ) -> BlockTable:
        """The block table of this call, noted for the report; v: see `chosen`."""
        table, _ = self.chosen(q, k, call, v)
        call.note(table)
        return table

    def chosen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        call: Call,
        v: torch.Tensor | None = None,
        **rules: object,
    ) -> Chosen:
        """Forced blocks and the `keep` best by the selector, or a table that serves this call too;
        the means only where they were made. v: for a selector that reads values. rules: see
        Selector.choose."""
        sizes = self.sizes(q, call)
        kept = self.sharing.find(call, q, k, sizes)
        if kept is not None:
            return kept, None
        keep = self.share(call.keep, block_count(k.shape[2], self.block_k))
        mine = call if keep == call.keep else replace(call, keep=keep)
        if self.selector.reads_values:
            mine = replace(mine, values=v)
        table, means = self.selector.choose(q, k, mine, sizes, **rules)
        self.sharing.keep(table, call, q, k, sizes)
        return table, means

    def share(self, keep: Keep, blocks: int) -> Keep:
        """The share of `blocks` that stands for `keep` of them, as this method rounds."""
        if not self.rounds_down:
            return keep
        if isinstance(keep, tuple):
            return tuple(max(1, int(x * blocks)) / blocks for x in keep)
        return max(1, int(keep * blocks)) / blocks

    def sizes(self, q: torch.Tensor, call: Call) -> tuple[int, int]:
        """Tokens in a query block of q [B, H, N, D] and in a key block."""
        return self.query_block(call.queries or q.shape[2]), self.block_k

    @property
    def by_parts(self) -> bool:
        """Can its output be merged from parts of the keys, see `part`?"""
        return False

    @property
    def by_means(self) -> bool:
        """Are means of blocks all that its choice of blocks looks at?"""
        plain = self.select == Means() and self.reuse == Reuse() and not self.sort
        return self.chooses and plain

    def part(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: BlockTable, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output over a part of the keys, and its log-sum-exp; table: of this part."""
        raise TypeError(f"{type(self).__name__} needs all keys at once")

    def complete(
        self, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> torch.Tensor:
        """The output from what the parts gave, float32. k, v: this process's own part."""
        return out

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> torch.Tensor:
        """q [B, H, Nq, D], k and v [B, H, Nk, D] → [B, H, Nq, D], in the order of each head if the
        method sorts."""
        return in_order(self, q, k, v, call) if self.sorts(call) else self.attend(q, k, v, call)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """The same, of tokens as they come."""
        raise TypeError(f"{type(self).__name__} defines no attention")
