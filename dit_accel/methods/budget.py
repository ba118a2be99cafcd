"""The keep of each head under a total that errs least (MoA, arXiv 2406.14909), from a profile of
where sparse attention errs. Pure data: no torch here."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.inputs.data import read_object
from dit_accel.inputs.fields import build
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from dit_accel.methods.base import Method

Curve = dict[float, float]


@dataclass(frozen=True)
class Profile:
    """What one dense generation shows.

    Args:
        method: the method that was tried, a text.
        heads: selector → layer → head → keep → ‖O_h − O_h,dense‖² / ‖O_dense‖² of the layer, a
            mean over the steps looked at: their sum over the heads is the layer's squared error.
        steps: selector → step → keep → mean ‖O − O_dense‖ / ‖O_dense‖ over the layers.
        overlap: layer → share of a step's chosen blocks that the last look chose, too.
        sorts: as `heads`, by the order of each head's tokens instead of the selector.
        layers: layer → earlier layer → share of its chosen blocks that the earlier one chose, too,
            of the head where it is least.
        mass: as `heads`, with the share of the attention that the chosen blocks hold instead of
            the error.
        linear: layer → ‖O − O_lin Wᵀ − b‖² / ‖O‖² of linear attention, at each look's best W and b.
        model: class of the transformer; empty in files older than it.
    """

    method: str
    heads: dict[str, dict[str, list[dict[str, float]]]]
    steps: dict[str, dict[str, dict[str, float]]]
    overlap: dict[str, float]
    sorts: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    linear: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    mass: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    model: str = ""

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """ValueError for a file that is no profile."""
        return build(cls, read_object(Path(path), "profile"), f"profile {path}")

    def curves(self, selector: str) -> dict[tuple[int, int], Curve]:
        """(layer, head) → keep → squared error; ValueError for a selector that was not tried.
        "per-head(…)": of the best of those tried, for each head and keep."""
        if selector.startswith("per-head"):
            tried = [self.curves(name) for name in self.heads]
            return {
                place: {keep: min(curves[place][keep] for curves in tried) for keep in curve}
                for place, curve in tried[0].items()
            }
        if selector not in self.heads:
            raise ValueError(
                f"this profile has the selectors {', '.join(self.heads)}, not {selector}"
            )
        return {
            (int(layer), head): {float(k): e for k, e in curve.items()}
            for layer, heads in self.heads[selector].items()
            for head, curve in enumerate(heads)
        }

    def schedule_heads(self, total: float, selector: str) -> dict[tuple[int, int], float]:
        """(layer, head) → keep, `total` on average."""
        return allocate(self.curves(selector), total)

    def masses(self, selector: str) -> dict[tuple[int, int], Curve]:
        """(layer, head) → keep → share of the attention; ValueError where it was not measured."""
        if selector not in self.mass:
            known = ", ".join(self.mass) or "none"
            raise ValueError(
                f"this profile has the mass of {known}, not of {selector}: dit-accel profile --mass"
            )
        return replace(self, heads=self.mass).curves(selector)

    def schedule(self, base: Schedule, total: float, selector: str, mass: bool = False) -> Schedule:
        """`base` with a keep for each head, `total` on average, or with the least that holds a
        `mass` of `total` of the head's attention (TCA)."""
        chosen = (
            {place: least(curve, total) for place, curve in self.masses(selector).items()}
            if mass
            else self.schedule_heads(total, selector)
        )
        layers = sorted({layer for layer, _ in chosen})
        heads = (tuple(chosen[n, h] for n_, h in sorted(chosen) if n_ == n) for n in layers)
        return replace(base, head_keep=tuple(zip(layers, heads, strict=True)))

    def linear_layers(self, share: float) -> tuple[int, ...]:
        """The `share` of the layers that linear attention serves best; ValueError where none was
        tried, and for a share outside of [0, 1]."""
        if not self.linear:
            raise ValueError("this profile tried no linear attention: dit-accel profile --linear")
        if not 0 <= share <= 1:
            raise ValueError(f"a share of the layers lies in [0, 1], not {share:g}")
        best = sorted(self.linear, key=lambda layer: self.linear[layer])
        return tuple(sorted(int(layer) for layer in best[: round(share * len(best))]))

    def leaders(self, count: int) -> tuple[int, ...]:
        """The layers, so many, whose tables the ones behind them read with the largest overlap:
        first the least of all overlaps, then their sum (HyLRA). ValueError where it was not
        measured, or for another number of layers."""
        names = sorted({int(layer) for layer in self.layers} | {
            int(layer) for row in self.layers.values() for layer in row
        })  # fmt: skip
        if not 1 <= count <= len(names):
            raise ValueError(f"leaders are 1 to {len(names)} layers of this profile, not {count}")
        overlap = {(int(j), int(i)): x for j, row in self.layers.items() for i, x in row.items()}
        spans = {
            (i, j): [overlap[n, names[i]] for n in names[i + 1 : j]]
            for i in range(len(names))
            for j in range(i + 1, len(names) + 1)
        }
        bound = max(
            (x for row in spans.values() for x in row),
            key=lambda x: (_best(spans, len(names), count, x) is not None, x),
            default=0.0,
        )
        found = _best(spans, len(names), count, bound) or tuple(range(len(names)))
        return tuple(names[i] for i in found)

    def gain(self, total: float, selector: str) -> tuple[float, float]:
        """Root mean squared errors of the layers at one keep for all heads and at one for each."""
        curves = self.curves(selector)
        layers = len({layer for layer, _ in curves})
        own = self.schedule_heads(total, selector)
        sums = [sum(at(c, k) for c, k in pairs) for pairs in (
            ((c, total) for c in curves.values()), ((c, own[n]) for n, c in curves.items())
        )]  # fmt: skip
        return tuple((x / layers) ** 0.5 for x in sums)


def at(curve: Mapping[float, float], keep: float) -> float:
    """The error at any keep, on straight lines between the measured ones; none at 1."""
    points = sorted({**curve, 1.0: 0.0}.items())
    if keep <= points[0][0]:
        return points[0][1]
    for (low, first), (high, last) in zip(points, points[1:], strict=False):
        if keep <= high:
            return first + (last - first) * (keep - low) / (high - low)
    return 0.0


def allocate(
    curves: Mapping[tuple[int, int], Mapping[float, float]], total: float
) -> dict[tuple[int, int], float]:
    """The keep of each head with the least sum of errors whose mean is `total`.

    Greedy on the lower convex hulls of the curves, which is exact for them; the last step is taken
    in part. Raises ValueError for a total outside what was measured.
    """
    hulls = {name: _hull({**curve, 1.0: 0.0}) for name, curve in curves.items()}
    keep = {name: hull[0][0] for name, hull in hulls.items()}
    left = total * len(hulls) - sum(keep.values())
    if left < -1e-9 or total > 1:
        least = sum(keep.values()) / len(hulls)
        raise ValueError(f"a total of {total:g} lies outside what was measured, {least:g} to 1")
    steps = [(_slope(hull, 0), name, 0) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps and left > 0:
        _, name, i = heapq.heappop(steps)
        wide = hulls[name][i + 1][0] - hulls[name][i][0]
        keep[name] += min(wide, left)
        left -= min(wide, left)
        if i + 2 < len(hulls[name]):
            heapq.heappush(steps, (_slope(hulls[name], i + 1), name, i + 1))
    return keep


def least(masses: Mapping[float, float], mass: float) -> float:
    """The least keep that holds a `mass` of the attention, on straight lines between the measured
    ones; all of it at 1."""
    points = sorted({**masses, 1.0: 1.0}.items())
    if mass <= points[0][1]:
        return points[0][0]
    for (low, first), (high, last) in zip(points, points[1:], strict=False):
        if mass <= last:
            return low + (high - low) * (mass - first) / (last - first)
    return 1.0


def _best(
    spans: Mapping[tuple[int, int], Sequence[float]], n: int, count: int, bound: float
) -> tuple[int, ...] | None:
    """The beginnings of `count` spans that n layers fall into, none with an overlap below `bound`,
    with the largest sum; None where there are none."""
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(n, 0): (0.0, ())}
    for i in range(n - 1, -1, -1):
        for c in range(1, count + 1):
            tried = [
                (sum(spans[i, j]) + best[j, c - 1][0], (i, *best[j, c - 1][1]))
                for j in range(i + 1, n + 1)
                if (j, c - 1) in best and min(spans[i, j], default=1.0) >= bound
            ]
            if tried:
                best[i, c] = max(tried)
    return best[0, count][1] if (0, count) in best else None


def _slope(hull: Sequence[tuple[float, float]], i: int) -> float:
    return (hull[i + 1][1] - hull[i][1]) / (hull[i + 1][0] - hull[i][0])


def _hull(curve: Mapping[float, float]) -> list[tuple[float, float]]:
    """The lower convex hull of (keep, error) points, keeps rising."""
    hull: list[tuple[float, float]] = []
    for point in sorted(curve.items()):
        while len(hull) > 1 and _slope([hull[-2], hull[-1]], 0) >= _slope([hull[-2], point], 0):
            hull.pop()
        hull.append(point)
    return hull


def head_keep(text: str, method: Method) -> tuple[float, tuple[tuple[int, tuple[float, ...]], ...]]:
    """(total, Schedule.head_keep) of "profile.json@0.1", for the selector of a method."""
    path, at_, total = text.rpartition("@")
    mass = total.startswith("mass")
    try:
        share = float(total.removeprefix("mass")) if at_ else method.keep
    except ValueError:
        raise ValueError(
            "heads is a profile and a keep or a mass, profile.json@0.1 or profile.json@mass0.9, "
            f"not {text!r}"
        ) from None
    if mass and not 0 < share <= 1:
        raise ValueError(f"a mass is a share of the attention in (0, 1], not {share:g}")
    profile = Profile.load(path if at_ else text)
    keeps = profile.schedule(Schedule(), share, str(method.select), mass).head_keep
    if not mass:
        return share, keeps
    every = [keep for _, row in keeps for keep in row]
    return sum(every) / len(every), keeps


def linear_layers(text: str) -> tuple[int, ...]:
    """The layers of "1,2,5", or of "profile.json@0.75": the share that errs least there."""
    path, at_, share = text.rpartition("@")
    try:
        if not at_:
            return tuple(int(number) for number in text.split(","))
        part = float(share)
    except ValueError:
        raise ValueError(
            f"linear layers are numbers, 1,2,5, or a profile and a share, profile.json@0.75, not "
            f"{text!r}"
        ) from None
    return Profile.load(path).linear_layers(part)
