"""Token order: which tokens share a block. An order is one index, gathered once per forward.

Raster rows are thin (64 tokens = four rows of a 16-wide grid); a tile or a Hilbert run is compact
in time and space, so that a block's mean stands for tokens that look alike. In the order of time a
place is followed through all frames before the next one (DeltaLLM, 2D-TPE: neighbours in time are
nearly equal).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.machine import cached_tensors

ORDERS = ("raster", "tile", "hilbert", "time")
Grid = tuple[int, int, int]


@cached_tensors(32)
def token_order(kind: str, grid: Grid, tile: Grid = (1, 8, 8)) -> torch.Tensor | None:
    """The permutation `index` int64 [T·H·W] on the CPU with x_ordered = x[index]; None for raster.

    Args:
        kind: "raster", "tile" (3-D tiles of `tile` tokens, ragged at the borders), "hilbert" or
            "time" (rows, then columns, then frames).
        grid: (T, H, W) tokens.
    """
    if kind not in ORDERS:
        raise ValueError(f"unknown token order {kind!r}: choose one of {', '.join(ORDERS)}")
    if kind == "raster":
        return None
    t, h, w = (torch.arange(n, device="cpu") for n in grid)
    cells = torch.stack(torch.meshgrid(t, h, w, indexing="ij"), -1).view(-1, 3)
    if kind == "time":
        whole = torch.arange(grid[0] * grid[1] * grid[2], device="cpu")
        return whole.view(grid).permute(1, 2, 0).flatten()
    key = _tile_key(cells, grid, tile) if kind == "tile" else _hilbert_key(cells)
    return torch.argsort(key, stable=True)


def _tile_key(cells: torch.Tensor, grid: Grid, tile: Grid) -> torch.Tensor:
    """Raster number of the tile each cell lies in; a stable sort keeps raster order inside."""
    counts = [-(-n // s) for n, s in zip(grid, tile, strict=True)]
    at = cells // torch.tensor(tile, device="cpu")
    return (at[:, 0] * counts[1] + at[:, 1]) * counts[2] + at[:, 2]


def _hilbert_key(cells: torch.Tensor) -> torch.Tensor:
    """Distance along the 3-D Hilbert curve of the enclosing power-of-two cube.

    Skilling's transposed form (AIP Conf. Proc. 707, 2004): undo the excess work bit by bit from the
    top, Gray-encode, then interleave the three coordinates' bits.
    """
    bits = max(1, int(cells.max()).bit_length())
    x = cells.clone()
    q = 1 << (bits - 1)
    while q > 1:
        low = q - 1
        for axis in range(3):
            hit = (x[:, axis] & q) != 0
            swap = torch.where(hit, 0, (x[:, 0] ^ x[:, axis]) & low)
            x[:, 0] ^= torch.where(hit, low, swap)
            if axis:
                x[:, axis] ^= swap
        q >>= 1
    x[:, 1] ^= x[:, 0]
    x[:, 2] ^= x[:, 1]
    flip = torch.zeros_like(x[:, 0])
    q = 1 << (bits - 1)
    while q > 1:
        flip ^= torch.where((x[:, 2] & q) != 0, q - 1, 0)
        q >>= 1
    x ^= flip[:, None]
    key = torch.zeros_like(x[:, 0])
    for bit in range(bits - 1, -1, -1):
        for axis in range(3):
            key = (key << 1) | ((x[:, axis] >> bit) & 1)
    return key


def inverse(index: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `index`."""
    back = torch.empty_like(index)
    back[index] = torch.arange(index.numel(), device=index.device)
    return back


@dataclass
class Order:
    """The token order of the forward that runs.

    kind: its name. tile: (T, H, W) of its boxes.
    pair: int64 [T·H·W] on its device, index with x_ordered = x[index] and back, which undoes it;
        None for raster.
    carried: the tokens pass through the whole model in this order; otherwise each attention call
    permutes its own.
    """

    kind: str
    tile: Grid
    pair: tuple[torch.Tensor, torch.Tensor] | None = None
    carried: bool = False
    _made: tuple[str, Grid, torch.device] | None = None

    @property
    def index(self) -> torch.Tensor | None:
        """The order, or None for raster."""
        return None if self.pair is None else self.pair[0]

    @property
    def back(self) -> torch.Tensor | None:
        """What undoes it, or None for raster."""
        return None if self.pair is None else self.pair[1]

    def begin(self, grid: Grid, device: torch.device, carried: bool) -> None:
        """A forward over this grid starts."""
        row = sum(n > 1 for n in grid) < 2  # tokens in a row have one order only
        wanted = ("raster" if row else self.kind, grid, device)
        if wanted != self._made:  # a copy to the device waits for it: not once per forward
            with torch.inference_mode(False):
                index = token_order(wanted[0], grid, self.tile)
                self.pair = None if index is None else (index.to(device), inverse(index).to(device))
            self._made = wanted
        self.carried = carried
