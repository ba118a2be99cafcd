"""Who runs: the first guidance pass of a step decides for the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_accel.pruning.config import TokenPruning
from dit_accel.pruning.criteria import CRITERIA, JOINT, Facts, pick
from dit_accel.pruning.rows import Rows
from dit_accel.pruning.shared import Part
from dit_accel.table import block_count, kept_blocks


@dataclass
class Selection:
    """The choice of one step.

    prune: by what and how many.
    made: (step, tokens) it was made for, None before the first.
    index: int64 [K], the tokens that run; None for all.
    """

    prune: TokenPruning
    made: tuple[int, int] | None = None
    index: Tensor | None = None

    def clear(self) -> None:
        """A new generation starts."""
        self.made = self.index = None

    def of(self, facts: Facts, rows: Rows, part: Part, due: bool) -> Tensor | None:
        """The tokens that run at this step. due: whether it may run part of them at all."""
        made = (facts.step, rows.n)
        if self.made != made:
            self.index = self._choose(facts, rows, part) if due else None
            self.made = made
        return self.index

    def _choose(self, facts: Facts, rows: Rows, part: Part) -> Tensor | None:
        prune = self.prune
        scores = {**CRITERIA, **JOINT}[prune.criterion](facts)
        if scores is None:
            return None
        always = part.always(rows.n, prune, scores.device)
        if always is None and prune.anchor_frames:
            _, h, w = rows.geometry.grid
            always = rows.cells(scores.device) < prune.anchor_frames * h * w
        count = kept_blocks(prune.keep, block_count(rows.n, prune.block)) if prune.keep else 0
        return pick(scores, count, prune.block, always, prune.threshold)
