"""The lines of the comparison: which configurations, at which keep, and their controls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dit_accel.config import AccelConfig, resolve
from dit_accel.methods import Method, find
from dit_accel.prune import TokenPruning
from dit_accel.prune_criteria import CRITERIA
from dit_accel.schedule import Schedule

KEEPS = (0.05, 0.1, 0.2, 0.3, 0.5)
FEWER = (0.8, 0.66, 0.5, 0.4, 0.3)
PRUNED = 0.5
PRUNING = "token pruning"  # the family of its rows, which are criteria at one keep: no line
_METHODS: dict[str, Callable[[float], Method]] = {
    "topk": lambda keep: find("topk")(keep),
    "pooled": lambda keep: find("pooled")(keep),
    "rectified": lambda keep: find("rectified")(keep, gapr=False),
    "rectified-gapr": lambda keep: find("rectified")(keep),
    "rettention": lambda keep: find("rettention")(keep),
    "shared": lambda keep: find("shared")(keep),
    "ditfastattn": lambda keep: find("rettention")(keep, rescale=False),
}
DEFAULT = ("steps", *_METHODS, "prune")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    family: rows that a plot joins by a line. steps: of the run; None takes as many as the dense
    reference.
    """

    name: str
    family: str
    config: AccelConfig
    steps: int | None = None

    @property
    def digest(self) -> str:
        """Same configuration, learned weights and steps, same digest."""
        text = json.dumps([self.config.to_dict(), self.steps], sort_keys=True).encode()
        weights = getattr(self.config.method, "weights", None)
        learned = Path(weights).read_bytes() if weights else b""
        return hashlib.sha256(text + learned).hexdigest()[:12]


def rows(
    names: Sequence[str],
    keeps: Sequence[float],
    steps: int,
    template: AccelConfig,
    sla_weights: str | None = None,
) -> list[Row]:
    """The rows of these names, the controls included where they are named.

    names: "steps" (dense with fewer steps), "prune" (token pruning, every criterion), a method of
    `DEFAULT`, "sla" (with weights only: untrained it is topk), else a preset or preset file.
    template: schedule, order and min_tokens of the method rows. Raises ValueError for a name or a
    keep that is none, and for no rows at all.
    """
    found: list[Row] = []
    for name in names:
        if name == "steps":
            found += _fewer(steps)
        elif name == "prune":
            found += _pruned(template)
        elif name == "sla" or name in _METHODS:
            found += [_sparse(name, keep, template, sla_weights) for keep in keeps]
        else:
            found.append(Row(name, name, resolve(name)))
    unique = {row.name: row for row in found}
    if not unique:
        raise ValueError(f"no rows are named: give some of {', '.join(DEFAULT)}")
    return list(unique.values())


def _fewer(steps: int) -> list[Row]:
    counts = sorted({max(1, round(steps * share)) for share in FEWER} - {steps}, reverse=True)
    dense = AccelConfig(find("dense")(), Schedule(warmup=0))
    return [Row(f"dense, {n} of {steps} steps", "fewer steps", dense, n) for n in counts]


def _pruned(template: AccelConfig) -> list[Row]:
    dense = replace(template, method=find("dense")())
    return [
        Row(
            f"pruning {PRUNED:.0%}, {criterion}",
            PRUNING,
            replace(dense, prune=TokenPruning(keep=PRUNED, criterion=criterion)),
        )
        for criterion in CRITERIA
    ]


def _sparse(name: str, keep: float, template: AccelConfig, weights: str | None) -> Row:
    if name == "sla":
        if weights is None:
            raise ValueError("the row sla needs --sla-weights: untrained SLA is topk exactly")
        method = find("sla")(keep, weights=weights)
    else:
        method = _METHODS[name](keep)
    return Row(f"{name} {keep:.0%}", name, replace(template, method=method))
