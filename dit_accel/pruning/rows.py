"""Where a block's arguments and its output hold the tokens, and the rows of those that run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.pipelines.base import NOWHERE, Geometry, SpanSite


@dataclass
class Rows:
    """The token rows of one forward.

    site: where the model's blocks have them.
    geometry: of the forward.
    order: int64 [N], the grid's cells of the tokens where they come permuted.
    n: visual tokens on this device.
    index: int64 [K], those that run; None for all.
    """

    site: SpanSite
    geometry: Geometry = NOWHERE
    order: Tensor | None = None
    n: int = 0
    index: Tensor | None = None
    _taken: dict[tuple[int, int], tuple[Any, Any]] = field(default_factory=dict)

    def begin(self, geometry: Geometry, order: Tensor | None) -> None:
        """A forward starts."""
        self.clear()
        self.geometry, self.order = geometry, order

    def clear(self) -> None:
        """Let go of a forward's tensors."""
        self.geometry, self.order, self.index = NOWHERE, None, None
        self._taken.clear()

    @property
    def running(self) -> bool:
        """Does a forward run?"""
        return self.geometry is not NOWHERE

    @property
    def share(self) -> float:
        """Of the tokens, those that run."""
        return 1.0 if self.index is None else self.index.numel() / self.n

    @property
    def grid(self) -> tuple[int, int, int]:
        """Where the tokens lie; a row when the model carries others than the grid's."""
        return self.geometry.grid if self.geometry.n_visual == self.n else (1, 1, self.n)

    def cells(self, device: torch.device) -> Tensor:
        """int64 [n]: each token's cell of the grid, frame by frame."""
        return torch.arange(self.n, device=device) if self.order is None else self.order.to(device)

    def among(self, total: int, visual: int) -> slice:
        """Where so many visual tokens lie in a row of `total` with text."""
        first = (total - visual) * self.geometry.text_first
        return slice(first, first + visual)

    def read(
        self, arguments: dict[str, Any], single: bool, n: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(visual, text) tokens [B, n, C], [B, T, C] of a block's arguments; n: None for all."""
        hidden = arguments[self.site.hidden]
        if single:
            return self._parted(hidden, n)
        return hidden, arguments.get(self.site.text)

    def write(
        self, arguments: dict[str, object], single: bool, visual: Tensor, text: Tensor | None
    ) -> None:
        """Exchange the visual tokens in a block's arguments."""
        arguments[self.site.hidden] = self.join(visual, text, single) if single else visual

    def split(self, out: Any, single: bool, n: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(visual, text) tokens of what a block returned; n: see `read`."""
        if single:
            return self._parted(out, n)
        at = self.site.visual
        return (out[at], out[1 - at]) if self.site.text else (out, None)

    def join(self, visual: Tensor, text: Tensor | None, single: bool) -> object:
        """What a block returns."""
        if single:
            parts = (text, visual) if self.geometry.text_first else (visual, text)
            row = torch.cat([x for x in parts if x is not None], dim=1)
            return row.transpose(0, 1).contiguous() if self.site.tokens_first else row
        if not self.site.text:
            return visual
        return (text, visual) if self.site.visual else (visual, text)

    def visual(self, x: Tensor) -> Tensor:
        """[B, n, C] of any rows: without those of text, zeros where history or references have
        none."""
        x = x.flatten(1, -2)
        missing = self.n - x.shape[1]
        if missing > 0:
            last = self.site.references_last
            return F.pad(x, (0, 0, 0, missing) if last else (0, 0, missing, 0))
        return x[:, self.among(x.shape[1], self.n)]

    def gather(self, arguments: dict[str, Any], text: Tensor | None, index: Tensor) -> None:
        """A block's arguments with the per-token rows of the tokens `index`."""
        text = arguments.get(self.site.keys) if text is None else text
        n_text = max(0 if text is None else text.shape[1], self.geometry.n_text or 0)
        for name, dim, rank in self.site.rows:
            name, _, part = name.partition(".")
            value = arguments.get(name)
            if value is None:
                continue
            if isinstance(value, dict):
                if value.get(part) is not None:
                    taken = self._take(value[part], dim, rank, n_text, index)
                    arguments[name] = {**value, part: taken}
            elif part:
                at = int(part)
                taken = self._take(value[at], dim, rank, n_text, index)
                arguments[name] = (*value[:at], taken, *value[at + 1 :])
            else:
                arguments[name] = self._take(value, dim, rank, n_text, index)
        if self.site.count:
            arguments[self.site.count] = index.numel()

    def _parted(self, row: Tensor, n: int | None) -> tuple[Tensor, Tensor]:
        """Text and n visual tokens of one row."""
        n = n or self.geometry.n_visual
        row = row.transpose(0, 1) if self.site.tokens_first else row
        if self.geometry.text_first:
            first = row.shape[1] - n
            return row[:, first:], row[:, :first]
        return row[:, :n], row[:, n:]

    def _take(self, value: Any, dim: int, rank: int, n_text: int, index: Tensor) -> Any:
        """`value` or the tensors in it that have `rank` dimensions, gathered along `dim`; once.

        Rows of text beside the visual ones stay; a single row, for all tokens, stays too.
        """
        which = (id(value), dim)
        if which not in self._taken:
            if isinstance(value, (tuple, list)):
                taken = type(value)(self._take(x, dim, rank, n_text, index) for x in value)
            elif value.ndim != rank or value.shape[dim] == 1:
                taken = value
            else:
                taken = value.index_select(dim, self._at(value.shape[dim], n_text, index))
            self._taken[which] = (value, taken)  # the value is held, so its id stays its own
        return self._taken[which][1]

    def _at(self, rows: int, n_text: int, index: Tensor) -> Tensor:
        """int64: which of an argument's rows are those of the tokens `index` and of the text."""
        if rows == self.n:
            return index
        if rows != self.n + n_text:
            raise RuntimeError(
                f"a block's argument has {rows} rows where the model has {self.n} visual and "
                f"{n_text} text tokens: the adapter's span does not fit this forward"
            )
        text = torch.arange(n_text, device=index.device)
        if self.geometry.text_first:
            return torch.cat([text, index + n_text])
        return torch.cat([index, text + self.n])
