"""What a profile tells a search: what each keep costs each layer, and what else is worth a try."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.config import AccelConfig
from dit_accel.evaluate.sensitivity import Sensitivity
from dit_accel.methods import Method
from dit_accel.methods.budget import Curve, Profile, allocate, at
from dit_accel.pipelines import registry
from dit_accel.pipelines.denoisers import transformers_of
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

EARLY, MORE = 0.3, 2.2  # of the sparse steps so many keep so much more: docs/understand/methods
Curves = Mapping[tuple[int, int], Curve]
Heads = dict[str, dict[str, list[dict[str, float]]]]  # of a profile's file


@dataclass(frozen=True)
class Way:
    """One way to run a method.

    name: of its trials. template: all but its schedule. felt: what each keep costs each layer.
    early: more is kept in the first sparse steps, and less later.
    """

    name: str
    template: AccelConfig
    felt: Sensitivity
    early: bool = False

    def at(self, warmup: float, steps: int) -> AccelConfig:
        """With so many dense steps at the start of a run of `steps`."""
        schedule = Schedule(warmup=warmup)
        if self.early:
            schedule = falling(schedule, self.template.method.keep, steps)
        return replace(self.template, schedule=schedule)


@dataclass(frozen=True)
class Budgets(Sensitivity):
    """heads[layer][keep]: the keep of each head, `keep` on average, with the least error."""

    heads: dict[int, dict[float, tuple[float, ...]]]

    def schedule(self, base: Schedule, limit: float) -> Schedule:
        """As Sensitivity's, with a keep for each head of a layer."""
        found = super().schedule(base, limit)
        rows = tuple((layer, self.heads[layer][keep]) for layer, keep in found.layer_keep)
        return replace(found, layer_keep=(), head_keep=rows)


Addition = Callable[[Way], Way | None]


def begun(profile: Profile, name: str, template: AccelConfig) -> Way:
    """A method by its name, with the selector that errs least where the name tells none;
    ValueError for a selector that the profile did not try."""
    method = template.method
    if method.chooses and name != "checkpoint" and "/" not in name:
        method = method.replaced(select=best(profile))
    known = str(method.select) if method.chooses and name != "checkpoint" else best(profile)
    label = method.label if name != "checkpoint" else name
    return Way(label, replace(template, method=method), layers_of(profile.curves(known)))


def additions(profile: Profile, path: str | Path, name: str) -> list[Addition]:
    """What may be added to a method, one after the other: an order of each head's tokens, more in
    the early steps, a keep for each head. Each gives None where it does not go with it."""

    def ordered(way: Way) -> Way | None:
        method = way.template.method
        if not profile.sorts or not method.chooses or method.selector.placed:
            return None
        template = replace(way.template, method=method.replaced(sort=f"per-head({path})"))
        felt = layers_of(_curves(profile, template.method))
        return replace(way, name=f"{way.name}, order per head", template=template, felt=felt)

    def early(way: Way) -> Way | None:
        if way.template.method.stateful:  # its full steps come early as it is
            return None
        return replace(way, name=f"{way.name}, more early", early=True)

    def budgeted(way: Way) -> Way | None:
        method = way.template.method
        if not (method.chooses and method.selector.counted):
            return None
        felt = heads_of(_curves(profile, method))
        return replace(way, name=f"{way.name}, keep per head", felt=felt)

    return [early] if name == "checkpoint" else [ordered, early, budgeted]


def check_profile(profile: Profile, path: str | Path, pipe: DiffusionPipeline) -> None:
    """ValueError for the profile of another model, or of another number of layers or heads."""
    kind, layers, heads = shape_of(pipe)
    measured = next(iter(profile.heads.values()), {})
    widths = {len(row) for row in measured.values()}
    if (profile.model or kind, len(measured), widths) == (kind, layers, {heads or max(widths)}):
        return
    seen = f"{profile.model or 'a model'} with {len(measured)} layers of {max(widths)} heads"
    raise ValueError(
        f"{path} is the profile of {seen}, not of this {kind} with {layers} layers of {heads}: "
        "make one of this model, with dit-accel profile"
    )


def read(path: str | Path, keeps: Sequence[float] | None) -> Profile:
    """A profile at these keeps alone, None: at all of its own; ValueError for one without them."""
    profile = Profile.load(path)
    if not profile.heads or not all(profile.heads.values()):
        raise ValueError(f"{path} has no errors of heads: make another with dit-accel profile")
    if keeps is None:
        return profile
    tried = next(iter(profile.curves(next(iter(profile.heads))).values()))
    unknown = [keep for keep in keeps if keep not in tried]
    if unknown:
        raise ValueError(
            f"{path} was measured at the keeps {', '.join(f'{keep:g}' for keep in tried)}, not at "
            f"{unknown[0]:g}: leave --keeps out"
        )
    return replace(profile, heads=_at(profile.heads, keeps), sorts=_at(profile.sorts, keeps))


def _at(tried: Heads, keeps: Sequence[float]) -> Heads:
    return {
        name: {
            layer: [{k: e for k, e in curve.items() if float(k) in keeps} for curve in row]
            for layer, row in layers.items()
        }
        for name, layers in tried.items()
    }


def shape_of(pipe: DiffusionPipeline) -> tuple[str, int, int | None]:
    """The transformer's class, and how many layers and heads attend; heads: None, not told."""
    transformer = transformers_of(pipe)[0]
    modules = registry.find(transformer).attentions(transformer)
    heads = {getattr(module, "heads", None) for module in modules.values()}
    return type(transformer).__name__, len(modules), heads.pop() if len(heads) == 1 else None


def best(profile: Profile) -> str:
    """The selector with the least error at the middle one of the keeps."""

    def error(name: str) -> float:
        curves = profile.curves(name).values()
        keeps = sorted(next(iter(curves)))
        return sum(at(curve, keeps[len(keeps) // 2]) for curve in curves)

    return min(profile.heads, key=error)


def layers_of(curves: Curves) -> Sensitivity:
    """What one keep of all its heads costs each layer."""
    squares: dict[int, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for (layer, _), curve in curves.items():
        for keep, error in curve.items():
            squares[layer][keep] += error
    return Sensitivity({n: {k: e**0.5 for k, e in row.items()} for n, row in squares.items()})


def heads_of(curves: Curves) -> Budgets:
    """What the best keeps of its heads cost each layer, by their mean."""
    errors: dict[int, dict[float, float]] = {}
    heads: dict[int, dict[float, tuple[float, ...]]] = {}
    for layer in sorted({layer for layer, _ in curves}):
        mine = {place: curve for place, curve in curves.items() if place[0] == layer}
        for total in sorted(next(iter(mine.values()))):
            found = allocate(mine, total)
            lost = sum(at(curve, found[place]) for place, curve in mine.items())
            errors.setdefault(layer, {})[total] = lost**0.5
            row = tuple(found[layer, head] for head in range(len(mine)))
            heads.setdefault(layer, {})[total] = row
    return Budgets(errors, heads)


def falling(base: Schedule, keep: float, steps: int) -> Schedule:
    """`base` with more in the first sparse steps of a run and less in the others, `keep` on
    average; `base` itself where there are too few."""
    dense = base.dense_steps(steps)
    sparse = steps - dense
    first = round(EARLY * sparse)
    if not 0 < first < sparse:
        return base
    most = min(MORE, 1 / keep)
    rest = keep * (sparse - most * first) / (sparse - first)
    start = floor((dense + first) / steps * 1e4) / 1e4  # rounded down: shares of steps go up
    return replace(base, step_keep=((0.0, most * keep), (start, rest)))


def _curves(profile: Profile, method: Method) -> Curves:
    """The errors of its selector; of an order for each head those of the best ones."""
    if method.sort:
        return replace(profile, heads=profile.sorts).curves("per-head")
    return profile.curves(str(method.select))
