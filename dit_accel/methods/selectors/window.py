"""Static windows: the key blocks nearest to a query block in the picture, in every frame, and
windows by axis.

A window is made of whole blocks, so that the share of tiles it touches is the share of elements it
keeps: a window of single tokens in raster order touches several times more tiles than it uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dit_accel.forward.order import Grid
from dit_accel.machine import cached_tensors
from dit_accel.methods.selectors.base import Fixed, Scored
from dit_accel.methods.selectors.near import Near
from dit_accel.table import BlockTable, block_count, kept_blocks

if TYPE_CHECKING:
    from dit_accel.methods.base import Call

WINDOWS = ("tile", "raster")


@dataclass(frozen=True)
class Window(Fixed):
    """The blocks in which any token lies that a window around any of a query block's tokens covers.

    A token's window has on each axis as many tokens as it says, `dilation` apart; at a border it
    is moved inwards, so that every token has as many (neighborhood attention, arXiv 2209.15001).
    `keep` is not asked.

    Args:
        t, h, w: tokens of the window in frames, rows and columns; None is the whole axis.
        dilation: (t, h, w), steps from one of them to the next.

    Raises ValueError for a size or a step below 1.
    """

    t: int | None = None
    h: int | None = None
    w: int | None = None
    dilation: Grid = (1, 1, 1)

    name: ClassVar[str] = "window"
    description: ClassVar[str] = "a window by axis, window(t=3,h=8,w=8,dilation=1x2x2); no keep"
    paper: ClassVar[str] = "arXiv 2403.04690 (Faster Neighborhood Attention)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(*(x for x in self.size if x is not None), *self.dilation, 1) < 1:
            raise ValueError(f"a window has sizes and dilations ≥ 1, not {self}")

    @property
    def size(self) -> tuple[int | None, int | None, int | None]:
        """(t, h, w)."""
        return self.t, self.h, self.w

    @property
    def placed(self) -> bool:
        return True

    def mask(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Near:
        """See `window_mask`; ValueError where the tokens form no grid."""
        grid, at = placed(self.name, q, k, call)
        return window_mask(self, grid, at, k.shape[2], sizes, call.index, q.device)


@dataclass(frozen=True)
class Nearest(Scored):
    """The `keep` blocks nearest in rows and columns, a nearer frame winning among equals."""

    name: ClassVar[str] = "nearest"
    description: ClassVar[str] = "the blocks nearest in the picture, in every frame"
    paper: ClassVar[str] = "arXiv 2406.08552 (DiTFastAttn), a window"

    @property
    def placed(self) -> bool:
        return True

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """Minus how many are nearer, [B, H, Mq, Mk]; ValueError where the tokens form no grid."""
        grid, (_, first, _) = placed(self.name, q, k, call)
        ranks = _ranks(grid, k.shape[2], *sizes, call.index, first > 0, q.device)
        rows = ranks[call.first // sizes[0] :][: block_count(q.shape[2], sizes[0])]
        return -rows.expand(*q.shape[:2], -1, -1)


def placed(name: str, q: Tensor, k: Tensor, call: Call) -> tuple[Grid, tuple[int, int, int]]:
    """(grid, (queries, where among the keys the visual ones begin, where among them the queries
    given do)); ValueError where the queries are not those of a grid."""
    grid, n = call.grid, call.queries or q.shape[2]
    if grid is None or grid[0] * grid[1] * grid[2] != n:
        raise ValueError(
            f"{name} looks where tokens lie and needs the grid of its {n} queries, not {grid}; "
            "take another selector, or give the grid"
        )
    return grid, (q.shape[2], k.shape[2] - n if call.text_first else 0, call.first)


@cached_tensors(8)
def window_mask(
    window: Window,
    grid: Grid,
    at: tuple[int, int, int],
    n_keys: int,
    sizes: tuple[int, int],
    index: Tensor | None,
    device: torch.device,
) -> Near:
    """The key blocks that a window touches, without text.

    grid: (T, H, W) of the visual tokens. at: see `placed`. index: permutation of the visual tokens
    from raster order, or None.
    """
    n_q, first, start = at
    n = grid[0] * grid[1] * grid[2]
    cells = torch.arange(n, device=device) if index is None else index.to(device)
    axes = zip(grid, window.size, window.dilation, strict=True)
    frames, rows, columns = (_seen(*axis).to(device) for axis in axes)
    blocks = (first + torch.arange(n, device=device)) // sizes[1]  # of each visual token
    mask = torch.zeros(block_count(n_q, sizes[0]), block_count(n_keys, sizes[1]), device=device)
    for row, own in enumerate(cells[start : start + n_q].split(sizes[0])):
        frame, inside = own // (grid[1] * grid[2]), own % (grid[1] * grid[2])
        both = rows[inside // grid[2]][:, :, None] * columns[inside % grid[2]][:, None]
        seen = frames[frame].T @ both.flatten(1)  # [T, H·W]: by how many of the block's tokens
        mask[row].index_add_(0, blocks, seen.flatten()[cells])
    kept = mask > 0
    return Near(kept, int(kept.sum(-1).max()))


def _seen(n: int, size: int | None, step: int) -> Tensor:
    """float32 [n, n]: 1 where place i of an axis sees place j."""
    at = torch.arange(n, device="cpu")
    room = (n - at % step + step - 1) // step  # places that are whole steps from i
    if size is None:
        return torch.ones(n, n)
    width, number = room.clamp(max=size), at // step
    begin = torch.minimum((number - width // 2).clamp(min=0), room - width)[:, None]
    inside = (number >= begin) & (number < begin + width[:, None])
    return (inside & (at[:, None] % step == at % step)).float()


@cached_tensors(8)
def _ranks(
    grid: Grid,
    n_keys: int,
    block_q: int,
    block_k: int,
    index: Tensor | None,
    text_first: bool,
    device: torch.device,
) -> Tensor:
    """float32 [Mq, Mk]: the places of key blocks by their distance, of two as far the first one."""
    far, _ = _distances("tile", grid, n_keys, block_q, block_k, index, text_first)
    return far.argsort(dim=-1, stable=True).argsort(-1).float().to(device)


@cached_tensors(8)
def window_rows(
    kind: str,
    grid: Grid,
    n_keys: int,
    keep: float,
    block_q: int,
    block_k: int,
    index: Tensor | None,
    text_first: bool,
    device: torch.device,
) -> BlockTable:
    """The window of one head as a table with B = H = 1, on `device`.

    Each query block keeps the max(1, ceil(keep · Mk)) key blocks whose centres lie nearest to its
    own, a nearer frame winning among equals, and every key block that holds text.

    Args:
        kind: "tile", distance in rows and columns, or "raster", distance along raster order.
        grid: (T, H, W) of the queries, which are the visual tokens.
        n_keys: visual and text tokens; the text stands before the visual ones if `text_first`.
        keep: share of the key blocks, in (0, 1].
        index: permutation of the visual tokens from raster order, or None.
    """
    far, text = _distances(kind, grid, n_keys, block_q, block_k, index, text_first)
    n_visual, far = grid[0] * grid[1] * grid[2], far.masked_fill(text, torch.inf)
    count = min(kept_blocks(keep, far.shape[1]), int((~text).sum()))
    mask = text.expand(far.shape).clone()
    mask.scatter_(1, far.topk(count, largest=False).indices, True)
    return BlockTable.from_mask(mask[None, None].to(device), block_q, block_k, n_visual, n_keys)


@cached_tensors(8)
def _distances(
    kind: str,
    grid: Grid,
    n_keys: int,
    block_q: int,
    block_k: int,
    index: Tensor | None,
    text_first: bool,
) -> tuple[Tensor, Tensor]:
    """float64 [Mq, Mk] from the centre of a query block to those of key blocks, and bool [Mk] of
    those that hold text; see window_rows."""
    n_visual = grid[0] * grid[1] * grid[2]
    cells = torch.arange(n_visual, device="cpu") if index is None else index.cpu()
    frame = cells // (grid[1] * grid[2])
    row, column = cells % (grid[1] * grid[2]) // grid[2], cells % grid[2]
    place = (row, column) if kind == "tile" else (row * grid[2] + column,)
    points = torch.stack([frame, *place], -1).double()
    first = n_keys - n_visual if text_first else 0
    q, k = centres(points, 0, n_visual, block_q), centres(points, first, n_keys, block_k)
    # Frames break ties only: their term stays below the smallest step of the others. By products of
    # matrices a distance of nothing would be as large as that.
    exact = "donot_use_mm_for_euclid_dist"
    far = (
        torch.cdist(q[:, 1:], k[:, 1:], compute_mode=exact)
        + 1e-6 * (q[:, None, 0] - k[None, :, 0]).abs()
    )
    tokens = torch.arange(n_keys, device="cpu")
    text = (tokens < first) | (tokens >= first + n_visual)
    text_blocks = torch.zeros(k.shape[0], dtype=torch.bool, device="cpu")
    text_blocks[tokens[text] // block_k] = True
    return far, text_blocks


def centres(points: Tensor, first: int, n: int, block: int) -> Tensor:
    """[M, …] mean place of each block's visual tokens, which start at `first` of n tokens."""
    block_of = (torch.arange(len(points), device="cpu") + first) // block
    sums = points.new_zeros(block_count(n, block), points.shape[1])
    sums.index_add_(0, block_of, points)
    sizes = torch.bincount(block_of, minlength=len(sums)).clamp(min=1)
    return sums / sizes[:, None]
