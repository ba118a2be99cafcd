"""SSTA, HunyuanVideo 1.5's sparse attention (arXiv 2511.18870): 3-D tiles by worth, and around."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import ops
from dit_accel.forward.order import Grid, token_order
from dit_accel.machine import cached_tensors
from dit_accel.methods.base import Call, Method
from dit_accel.table import BlockTable, block_count, kept_blocks


class Canvas(NamedTuple):
    """A clip's grid filled up to whole tiles.

    slots: int64 [n], where each token lies in the canvas, tile after tile. size: its tokens.
    near: bool [M, M], the tiles of each one's window.
    """

    slots: Tensor
    size: int
    near: Tensor


@dataclass(frozen=True)
class SSTA(Method):
    """Exact attention to the best 3-D tiles and to a window of tiles around the query's own.

    Tile j is worth λ·cos(q̄_i, k̄_j) − (1 − λ)·mean of cos(k̄_m, k̄_j) over the others m: like the
    query, unlike what else could be read. Short tiles are filled up with zeros, which a softmax
    counts, as the published kernel does: the model was trained so. Text is always read.

    Args:
        keep: share of the tiles that are chosen, besides the window; `most` of them are the limit.
        most: tiles chosen, half of it in clips of at most 31 latent frames.
        tile: (t, h, w) tokens of a tile, a multiple of 64 together.
        window: (t, h, w) tiles, each odd; at a border it is moved inwards. A picture has none.
        likeness: λ.

    Raises ValueError for a value outside its range.
    """

    keep: float = 1.0
    most: int = 64
    tile: Grid = (6, 8, 8)
    window: Grid = (3, 3, 3)
    likeness: float = 0.7

    chooses: ClassVar[bool] = False
    always: ClassVar[bool] = True
    name: ClassVar[str] = "ssta"
    description: ClassVar[str] = "exact on the best 3-D tiles and on those around"
    paper: ClassVar[str] = "arXiv 2511.18870"

    def __post_init__(self) -> None:
        for name in ("tile", "window"):
            sizes = tuple(getattr(self, name))
            object.__setattr__(self, name, sizes)
            if len(sizes) != 3 or min(sizes) < 1:
                raise ValueError(f"{name} is three sizes (t, h, w) ≥ 1, not {sizes}")
        if prod(self.tile) % 64 or not all(size % 2 for size in self.window):
            raise ValueError(
                f"a tile of SSTA holds a multiple of 64 tokens and its window is odd, unlike "
                f"{self.tile} and {self.window}"
            )
        if self.most < 1 or not 0 <= self.likeness <= 1:
            raise ValueError(
                f"most is ≥ 1 and likeness in [0, 1], not {self.most}, {self.likeness}"
            )
        super().__post_init__()

    @property
    def layout(self) -> Grid:
        """Tokens are laid out in its tiles."""
        return self.tile

    @property
    def block(self) -> int:
        """Tokens in a block of the kernels."""
        return 64 if prod(self.tile) % 128 else 128

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        n = 0 if call.grid is None else prod(call.grid)
        if call.grid is None or q.shape[2] != n:
            raise ValueError(
                f"SSTA takes a clip's grid and its queries; not {q.shape[2]} queries and the grid "
                f"{call.grid}"
            )
        canvas = canvas_of(call.grid, self.tile, self.window, call.index is not None, q.device)
        valid = call.kv_len
        if isinstance(valid, int):
            k, v, valid = k[:, :, :valid], v[:, :, :valid], None
        if call.text_first:
            k, v = (_clip_first(x, n, valid) for x in (k, v))
        filled, clip = _filled(q, canvas), _filled(k[:, :, :n], canvas)
        table = self._choose(filled, clip, canvas, k.shape[2] - n, call)
        keys = torch.cat([clip, k[:, :, n:]], 2)
        values = torch.cat([_filled(v[:, :, :n], canvas), v[:, :, n:]], 2)
        valid = None if valid is None else valid + canvas.size - n
        out = ops.block_sparse_attention(filled, keys, values, table, call.scale, kv_len=valid)
        return out.index_select(2, canvas.slots)

    def _choose(self, q: Tensor, k: Tensor, canvas: Canvas, n_text: int, call: Call) -> BlockTable:
        """The table of blocks: of each tile its own, those of the text behind."""
        size, block = prod(self.tile), self.block
        tiles, pieces = canvas.size // size, size // block
        frames = 1 if call.grid is None else call.grid[0]
        most = self.most // 2 if 1 < frames <= 31 else self.most
        count = min(max(most, 1), kept_blocks(call.keep, tiles))
        best = self._worth(q, k, size).topk(count, -1).indices
        mask = torch.zeros(*best.shape[:3], tiles, dtype=torch.bool, device=q.device)
        mask = mask.scatter_(-1, best, True) | canvas.near
        width = min(tiles, count + prod(self.window))
        chosen = BlockTable.from_mask(mask, size, size, canvas.size, canvas.size, width)
        n = canvas.size + n_text
        blocks = block_count(n, block)
        own = chosen.indices.masked_fill(~chosen.valid(), blocks)[..., None] * pieces
        own = (own + torch.arange(pieces, device=q.device, dtype=own.dtype)).flatten(-2)
        beside = torch.arange(tiles * pieces, blocks, device=q.device, dtype=own.dtype)
        rows = torch.cat([own, beside.expand(*own.shape[:3], -1)], -1).sort(-1).values
        counts = (rows < blocks).sum(-1, dtype=torch.int32).repeat_interleave(pieces, 2)
        indices = rows.clamp(max=blocks - 1).repeat_interleave(pieces, 2)
        table = BlockTable(indices, counts, block, block, canvas.size, n, uneven=chosen.uneven)
        call.note(table)
        return table

    def _worth(self, q: Tensor, k: Tensor, size: int) -> Tensor:
        """[B, H, M, M] float32: what tile j is worth to the queries of tile i."""
        q, k = (
            F.normalize(x.detach().unflatten(2, (-1, size)).mean(3, dtype=torch.float32), dim=-1)
            for x in (q, k)
        )
        alike = k @ k.mT
        others = alike.sum(-2, keepdim=True) - alike.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        common = others / max(1, k.shape[2] - 1)
        return self.likeness * (q @ k.mT) - (1 - self.likeness) * common


def _clip_first(x: Tensor, n: int, valid: Tensor | None) -> Tensor:
    """x [B, H, N, D] with the n tokens of the clip in front of the text that came before them.

    valid: int [B], tokens before the padding; None: all.
    """
    if valid is None:
        return torch.cat([x[:, :, x.shape[2] - n :], x[:, :, : x.shape[2] - n]], 2)
    at, text = torch.arange(x.shape[2], device=x.device), (valid - n)[:, None]
    index = torch.where(at < n, at + text, torch.where(at < text + n, at - n, at))
    return x.take_along_dim(index[:, None, :, None], 2)


def _filled(x: Tensor, canvas: Canvas) -> Tensor:
    """x [B, H, n, D] on the canvas, zeros where there is no token."""
    return x.new_zeros(*x.shape[:2], canvas.size, x.shape[3]).index_copy(2, canvas.slots, x)


@cached_tensors(32)
def canvas_of(grid: Grid, tile: Grid, window: Grid, laid: bool, device: torch.device) -> Canvas:
    """laid: the tokens are in the order of the tiles already, not in raster order."""
    counts = [ceil(n / size) for n, size in zip(grid, tile, strict=True)]
    tiles = rows = torch.zeros(1, 1, 1, dtype=torch.int64)
    for axis, (n, size) in enumerate(zip(grid, tile, strict=True)):
        at = torch.arange(n).view([-1 if i == axis else 1 for i in range(3)])
        tiles, rows = tiles * counts[axis] + at // size, rows * size + at % size
    slots = (tiles * prod(tile) + rows).flatten()
    index = token_order("tile", grid, tile) if laid else None
    slots = slots if index is None else slots[index]
    near = torch.ones(1, 1, dtype=torch.bool)
    for n, width in zip(counts, window if grid[0] > 1 else (1, 1, 1), strict=True):
        at, half = torch.arange(n), width // 2
        middle = torch.minimum(at.clamp(min=half), torch.tensor(n - 1 - half))
        line = (middle[:, None] - at).abs() <= half
        near = torch.kron(near.int(), line.int()).bool()
    return Canvas(slots.to(device), prod(counts) * prod(tile), near.to(device))
