"""Which key blocks each query block reads, as one run chose them: what the attention view draws."""

from __future__ import annotations

import base64
from typing import Any

import torch

from dit_accel.api import Handle
from dit_accel.forward.order import token_order
from dit_accel.table import BlockTable

MOST = 2 * 2**20  # bytes of all layers together


class Sight:
    """Listens to one accelerated run and keeps a table of each layer, from its second half.

    Only of models whose attention sees the visual tokens alone, all of them, in an order that is
    one permutation for all heads.
    """

    def __init__(self, handle: Handle, steps: int) -> None:
        self.handle, self.after = handle, steps // 2
        self.rows: dict[int, torch.Tensor] = {}
        self.step, self.sizes = 0, (0, 0)
        config = handle.config
        if config.prune is None and config.method.layout is None and not config.method.sort:
            handle.watch(self._hear)

    def _hear(self, layer: int, table: BlockTable) -> None:
        clock = self.handle.clock
        t, h, w = clock.geometry.grid
        whole = table.n_q == table.n_k == t * h * w
        if clock.step < self.after or layer in self.rows or not whole:
            return
        if (layer + 1) * table.query_blocks * table.key_blocks > MOST:
            return
        share = table.to_mask()[0].float().mean(0)
        self.rows[layer] = (share * 255).round().byte().cpu()
        self.step, self.sizes = clock.step, (table.block_q, table.block_k)

    def to_dict(self) -> dict[str, Any] | None:
        """JSON-able; None where nothing was seen.

        grid: (T, H, W) tokens. block_q, block_k: tokens of a block. order: bytes of int32, the
        place of each token of raster order in the blocks; None where it is the same. layers: number
        and bytes [query blocks][key blocks], the share of the heads that read it, of 255.
        """
        if not self.rows:
            return None
        grid, config = self.handle.clock.geometry.grid, self.handle.config
        index = token_order(config.order, grid, config.tile)
        order = None if index is None else _text(torch.argsort(index).int())
        return {
            "grid": list(grid),
            "step": self.step + 1,
            "block_q": self.sizes[0],
            "block_k": self.sizes[1],
            "order": order,
            "layers": [[layer, _text(rows)] for layer, rows in sorted(self.rows.items())],
        }


def _text(values: torch.Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()
