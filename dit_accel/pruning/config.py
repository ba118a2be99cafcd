"""Token pruning as span reuse: which blocks of tokens run through the model, and when.

    probe    blocks before `first` see all tokens
    select   the `keep` blocks of tokens with the highest score; the same for all guidance passes
    span     h_S ← Block(h_S) for first ≤ block < last, each token with its own position
    update   R_S ← h_out − h_in of the tokens that ran
    restore  h_out = h_in + R of the tokens that did not
    tail     the blocks from `last` on, the norm and the projection see all tokens

This file is pure data; span.py runs it, criteria.py scores tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel.inputs import fields
from dit_accel.pruning.context import CONTEXTS
from dit_accel.pruning.criteria import CRITERIA, JOINT
from dit_accel.pruning.restore import RESTORES
from dit_accel.schedule import check_share, count_steps


@dataclass(frozen=True)
class TokenPruning:
    """Run only part of the tokens through the span; the others reuse what the span did to them.

    Args:
        keep: share of the token blocks that run, in [0, 1]; 0 skips the span (First-Block-Cache),
            1 prunes nothing.
        refresh: all tokens run again every `refresh` steps.
        start, end: steps at both ends that run all tokens: a share (float) or a number (int).
        first, last: the span's block numbers, first ≤ block < last; negative ones count from the
            model's end, None is its end.
        criterion: what makes a token worth running; "random", "stratified" and "lru" look at none;
            "text" is for joint text-image models.
        threshold: with criterion="drift": only blocks that drifted at least so much since they ran
            last run, at most `keep` of all; None: always `keep` of all.
        restore: "reuse" (R as it was), "taylor" (extrapolated from its last two values), "blend"
            (moved as its neighbours' that ran) or "copy" (of the most similar token that ran).
        context: what tokens that run see of the others: "drop" (nothing), "pooled" (each block's
            mean key and value of earlier) or "stale" (all their keys and values of earlier).
        anchor_frames: latent frames at the start whose tokens always run (1 for image to video).
        block: tokens in a block.
        seed: of criterion="random".

    Raises ValueError for a value outside its range.
    """

    keep: float = 0.5
    refresh: int = 4
    start: float | int = 0.15
    end: float | int = 2
    first: int = 1
    last: int | None = -1
    criterion: str = "stratified"
    threshold: float | None = None
    restore: str = "reuse"
    context: str = "drop"
    anchor_frames: int = 0
    block: int = 64
    seed: int = 0

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"keep": 0.7, "refresh": 3},
        "balanced": {"keep": 0.5, "refresh": 4},
        "fast": {"keep": 0.35, "refresh": 5},
    }

    def __post_init__(self) -> None:
        fields.check(self)
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep is the share of tokens that run, in [0, 1], not {self.keep}")
        for name, low in (("refresh", 1), ("block", 1), ("anchor_frames", 0), ("first", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is a number ≥ {low}, not {getattr(self, name)}")
        for name in ("start", "end"):
            check_share(name, getattr(self, name))
        names = {"criterion": (*CRITERIA, *JOINT), "restore": RESTORES, "context": CONTEXTS}
        for name, values in names.items():
            if getattr(self, name) not in values:
                choice = ", ".join(values)
                raise ValueError(f"{name} is one of {choice}, not {getattr(self, name)!r}")
        looks = [word for word in ("drift", "ttv", "text") if word in self.criterion]
        if looks and self.first == 0:
            raise ValueError(
                f"criterion {self.criterion!r} looks at what the blocks before `first` do, and "
                "first=0 leaves it none: first is ≥ 1"
            )
        if self.threshold is not None and (self.threshold < 0 or self.criterion != "drift"):
            raise ValueError(
                "threshold is a relative change ≥ 0 with criterion='drift', not "
                f"{self.threshold} with {self.criterion!r}"
            )

    def span(self, blocks: int) -> tuple[int, int]:
        """(first, last) of a model with this many blocks; ValueError when nothing lies between."""
        last = blocks if self.last is None else self.last + blocks * (self.last < 0)
        if not 0 <= self.first < last <= blocks:
            raise ValueError(
                f"the pruned span from block {self.first} to {self.last} is empty or outside "
                f"a model of {blocks} blocks"
            )
        return self.first, last

    def prunes(self, step: int, steps: int | None, full: int) -> bool:
        """Whether this step runs part of the tokens only; `full`: the step that ran all last."""
        first = max(count_steps(self.start, steps or 0), 1)
        end = count_steps(self.end, steps or 0)
        if step < first or (steps is not None and step >= steps - end):
            return False
        if self.keep == 1 and self.threshold is None:
            return False
        return step - full < self.refresh


def resolve(prune: TokenPruning | str | float | None) -> TokenPruning | None:
    """The pruning of an object, of a preset's name, of a share of the tokens (0.5 or "0.5"), or
    none.

    Raises ValueError for another text or a share outside [0, 1], TypeError for another object.
    """
    if prune is None or isinstance(prune, TokenPruning):
        return prune
    if isinstance(prune, bool) or not isinstance(prune, (str, int, float)):
        kind = type(prune).__name__
        raise TypeError(f"prune is a TokenPruning, a share or a preset's name, not {kind}")
    if prune in TokenPruning.presets:
        return TokenPruning(**TokenPruning.presets[prune])
    try:
        share = float(prune)
    except ValueError:
        have = ", ".join(TokenPruning.presets)
        raise ValueError(
            f"prune is the share of the tokens that run (0.5) or one of {have}, not {prune!r}"
        ) from None
    return TokenPruning(share)
