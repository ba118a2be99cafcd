"""The order in which each head reads its tokens: those of a block should be alike.

2D-TPE (arXiv 2409.19700) lets heads choose the way in which they walk over a table; Routing
Transformer (arXiv 2003.05997) puts tokens into clusters. Four gathers a call, but for `none`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.forward.order import ORDERS, Grid, inverse, token_order
from dit_accel.inputs.fields import check
from dit_accel.machine import cached_tensors
from dit_accel.methods.budget import Profile, at
from dit_accel.table import block_count

if TYPE_CHECKING:
    from dit_accel.methods.base import Call, Method
    from dit_accel.methods.selectors.base import Selector

NONE, CLUSTERS, PER_HEAD = "none", "clusters", "per-head"
KINDS = (NONE, *(name for name in ORDERS if name != "raster"), CLUSTERS)
ROUNDS = 4  # of k-means


class Way(NamedTuple):
    """int64 [1 or B, 1 or H, N]: tokens in the order of the blocks, of queries and of keys (text
    stays where it is), and what undoes that of the queries."""

    queries: Tensor
    keys: Tensor
    back: Tensor


@dataclass(frozen=True)
class Sort:
    """How the visual tokens of each head are put before blocks are chosen.

    Args:
        kind: "none" (as they come), "tile" (1 × 8 × 8), "hilbert", "time" (the same for all heads),
            "clusters" (k-means of each head's queries, and of its keys, at each call: as many
            clusters as blocks, by the cosine) or "per-head".
        file: for "per-head", what `dit-accel profile --sorts` wrote: of each head the order that
            errs least there at the method's keep.

    Raises ValueError for another kind, and for a file that is no profile with orders.
    """

    kind: str = NONE
    file: str = ""

    def __post_init__(self) -> None:
        check(self)
        if self.kind not in (*KINDS, PER_HEAD) or (self.kind == PER_HEAD) != bool(self.file):
            known = ", ".join(KINDS)
            raise ValueError(f"sort is {known} or per-head(profile.json), not {self}")
        if self.file:
            object.__setattr__(self, "_known", Profile.load(self.file).sorts)
            if not self.known:
                raise ValueError(
                    f"{self.file} tried no orders: dit-accel profile --sorts time,tile"
                )

    @property
    def known(self) -> dict[str, dict[str, list[dict[str, float]]]]:
        """Order → layer → head → keep → error, of a file."""
        return self.__dict__["_known"]

    def __bool__(self) -> bool:
        return self.kind != NONE

    def __str__(self) -> str:
        return f"{self.kind}({self.file})" if self.file else self.kind

    @classmethod
    def read(cls, text: str) -> Sort:
        """The inverse of str; ValueError for another text."""
        kind, bracket, file = text.strip().partition("(")
        return cls(kind.strip(), file.removesuffix(")").strip()) if bracket else cls(kind)

    @property
    def placed(self) -> bool:
        """Does it look where tokens lie in the picture?"""
        return bool(self) and self.kind != CLUSTERS

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from."""
        return (Path(self.file),) if self.file else ()

    def kinds(self, layer: int, heads: tuple[int, ...], keep: float) -> list[str]:
        """The order of each of these heads."""
        if self.kind != PER_HEAD:
            return [self.kind] * len(heads)
        found = []
        for head in heads:
            curves = {
                kind: dict(enumerate(x.get(str(layer), []))) for kind, x in self.known.items()
            }
            if any(head not in curve for curve in curves.values()):
                raise ValueError(
                    f"{self.file} knows nothing of head {head} in layer {layer}: profile this model"
                )
            error = {
                kind: at({float(k): e for k, e in curve[head].items()}, keep)
                for kind, curve in curves.items()
            }
            found.append(min(error, key=lambda kind: error[kind]))
        return found

    def way(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], keep: float) -> Way:
        """The order of q [B, H, N, D] and k. sizes: tokens in a query and in a key block. keep: the
        method's, so that the order stays while that of steps and heads changes.

        ValueError where an order of the picture has no grid, or part of the queries are here.
        """
        n, n_k = q.shape[2], k.shape[2]
        if call.queries not in (None, n):
            raise ValueError(f"sort={self} needs all {call.queries} queries at once, not {n}")
        first = n_k - n if call.text_first else 0
        if self.kind == CLUSTERS:
            rows = clustered(q.detach(), block_count(n, sizes[0]))
            columns = clustered(k.detach()[:, :, first : first + n], block_count(n, sizes[1]))
            return Way(rows, among(columns, first, n_k), rows.argsort(-1))
        grid = call.grid
        if grid is None or grid[0] * grid[1] * grid[2] != n:
            raise ValueError(f"sort={self} needs the grid of its {n} queries, not {grid}")
        heads = call.heads or tuple(range(q.shape[1]))
        kinds = _kinds(self, call.layer, heads, keep)
        return fixed(kinds, grid, call.index, first, n_k, q.device)


def check_sort(sort: Sort, selector: Selector, name: str, remembers: bool) -> None:
    """ValueError for what an order of each head's tokens does not go with. remembers: the method
    of this name keeps something from call to call."""
    if selector.placed:
        raise ValueError(
            f"the selector {selector} looks where tokens lie, and sort={sort} moves them: take "
            "another selector, or no sort"
        )
    if sort.kind == CLUSTERS and remembers:
        raise ValueError(
            f"clusters change with every call, and {name} keeps a state or tables from call to "
            "call: take another sort"
        )


@lru_cache(1024)
def _kinds(sort: Sort, layer: int, heads: tuple[int, ...], keep: float) -> tuple[str, ...]:
    kinds = sort.kinds(layer, heads, keep)
    return tuple(kinds[:1] if len(set(kinds)) == 1 else kinds)


@cached_tensors(64)
def fixed(
    kinds: tuple[str, ...],
    grid: Grid,
    index: Tensor | None,
    first: int,
    n_keys: int,
    device: torch.device,
) -> Way:
    """Orders of the picture, one for each head or for all; index: the one that tokens are in."""
    whole = torch.arange(grid[0] * grid[1] * grid[2], device="cpu")
    rows = []
    for kind in kinds:
        order = None if kind == NONE else token_order(kind, grid)
        at_hand = whole if index is None or kind == NONE else inverse(index.cpu())
        rows.append(whole if order is None else at_hand[order])
    queries = torch.stack(rows)[None]
    ways = queries, among(queries, first, n_keys), queries.argsort(-1)
    return Way(*(x.to(device) for x in ways))


def among(order: Tensor, first: int, n_keys: int) -> Tensor:
    """An order [B, H, n] of visual keys as one of all keys, of which they begin at `first`."""
    index = torch.arange(n_keys, device=order.device).expand(*order.shape[:2], -1).clone()
    index[..., first : first + order.shape[2]] = order + first
    return index


def clustered(x: Tensor, count: int) -> Tensor:
    """int64 [B, H, N]: the tokens of x [B, H, N, D] by spherical k-means, cluster after cluster.

    Centres begin at tokens evenly apart; in a cluster tokens stay in their order.
    """
    n = x.shape[2]
    out = torch.empty(x.shape[:3], dtype=torch.int64, device=x.device)
    seeds = (torch.arange(count, device=x.device) * n + n // 2) // count
    for b, h in product(*map(range, x.shape[:2])):
        tokens = F.normalize(x[b, h].float(), dim=-1)
        centres = tokens[seeds]
        for _ in range(ROUNDS):
            nearest = (tokens @ centres.T).argmax(-1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, tokens)
            empty = torch.bincount(nearest, minlength=count) == 0
            centres = torch.where(empty[:, None], centres, F.normalize(sums, dim=-1))
        out[b, h] = (tokens @ centres.T).argmax(-1).argsort(stable=True)
    return out


def in_order(method: Method, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """What a method gives, [B, H, N, D], with the tokens of each head in its order."""
    way = method.sorting.way(q, k, call, method.sizes(q, call), method.keep)
    mine = replace(call, sorted=True)
    out = method(put(q, way.queries), put(k, way.keys), put(v, way.keys), mine)
    return put(out, way.back)


def put(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, N, D] with the tokens of each head in this order, laid out as x is.

    A token of a head is a row of D channels, and rows are read whole; `take_along_dim` would look
    each channel up.
    """
    if index.shape[:2] == (1, 1):
        return x.index_select(2, index[0, 0])
    b, h, n, d = x.shape
    batch, head = (torch.arange(size, device=x.device) for size in (b, h))
    if x.transpose(1, 2).is_contiguous():  # [B, N, H, D], as diffusers has it
        rows = (batch[:, None, None] * n + index.transpose(1, 2)) * h + head
        found = x.transpose(1, 2).reshape(-1, d).index_select(0, rows.flatten())
        return found.view(b, n, h, d).transpose(1, 2)
    rows = (batch[:, None, None] * h + head[:, None]) * n + index
    return x.reshape(-1, d).index_select(0, rows.flatten()).view(b, h, n, d)
