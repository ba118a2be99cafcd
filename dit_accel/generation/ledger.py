"""Kept work per layer and step, read off the handle's report after each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_accel.api import Report

if TYPE_CHECKING:
    from dit_accel.runtime.report import LayerCalls


class Ledger:
    """`cells[step][layer]`: share of attention work kept, guidance passes averaged; 1 is dense.

    None stands for a layer that was not called at that step (a second expert's, for one).
    """

    def __init__(self) -> None:
        self.cells: list[list[float | None]] = []
        self._before: list[tuple[int, float]] = []

    def read(self, report: Report) -> None:
        """Add the step that has just ended."""
        totals = [_total(layer) for layer in report.layers]
        before = self._before or [(0, 0.0)] * len(totals)
        pairs = zip(totals, before, strict=True)
        self.cells.append([(k - k0) / (n - n0) if n > n0 else None for (n, k), (n0, k0) in pairs])
        self._before = totals


def _total(layer: LayerCalls) -> tuple[int, float]:
    calls = layer["sparse"] + layer["dense"]
    return calls, layer["kept"] * calls
