"""Static windows: the key blocks nearest to a query block in the picture, in every frame.

A window is made of whole blocks, so that the share of tiles it touches is the share of elements it
keeps: a window of single tokens in raster order touches several times more tiles than it uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.forward.order import Grid
from dit_accel.machine import cached_tensors
from dit_accel.table import BlockTable, block_count, kept_blocks

WINDOWS = ("tile", "raster")


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
    n_visual = grid[0] * grid[1] * grid[2]
    cells = torch.arange(n_visual, device="cpu") if index is None else index.cpu()
    frame = cells // (grid[1] * grid[2])
    row, column = cells % (grid[1] * grid[2]) // grid[2], cells % grid[2]
    place = (row, column) if kind == "tile" else (row * grid[2] + column,)
    points = torch.stack([frame, *place], -1).double()
    first = n_keys - n_visual if text_first else 0
    q, k = _centres(points, 0, n_visual, block_q), _centres(points, first, n_keys, block_k)
    # Frames break ties only: their term stays below the smallest step of the others.
    far = torch.cdist(q[:, 1:], k[:, 1:]) + 1e-6 * (q[:, None, 0] - k[None, :, 0]).abs()
    tokens = torch.arange(n_keys, device="cpu")
    text = (tokens < first) | (tokens >= first + n_visual)
    text_blocks = torch.zeros(k.shape[0], dtype=torch.bool, device="cpu")
    text_blocks[tokens[text] // block_k] = True
    far[:, text_blocks] = torch.inf
    count = min(kept_blocks(keep, k.shape[0]), int((~text_blocks).sum()))
    mask = text_blocks.expand(far.shape).clone()
    mask.scatter_(1, far.topk(count, largest=False).indices, True)
    return BlockTable.from_mask(mask[None, None].to(device), block_q, block_k, n_visual, n_keys)


def window_table(rows: BlockTable, batch: int, heads: int) -> BlockTable:
    """`rows` of one head for all heads of a batch."""
    shape = (batch, heads, -1, -1)
    indices = rows.indices.expand(shape).contiguous()
    counts = rows.counts.expand(shape[:3]).contiguous()
    return BlockTable(indices, counts, rows.block_q, rows.block_k, rows.n_q, rows.n_k)


def _centres(points: Tensor, first: int, n: int, block: int) -> Tensor:
    """[M, …] mean place of each block's visual tokens, which start at `first` of n tokens."""
    block_of = (torch.arange(len(points), device="cpu") + first) // block
    sums = points.new_zeros(block_count(n, block), points.shape[1])
    sums.index_add_(0, block_of, points)
    sizes = torch.bincount(block_of, minlength=len(sums)).clamp(min=1)
    return sums / sizes[:, None]
