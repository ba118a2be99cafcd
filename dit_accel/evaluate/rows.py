"""The lines of the comparison: which configurations, at which keep, and their controls."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dit_accel.config import AccelConfig, resolve
from dit_accel.generation.boost import Boost
from dit_accel.generation.variant import Variant, additions
from dit_accel.methods import Method
from dit_accel.methods.dense import Dense
from dit_accel.methods.pooled import Pooled
from dit_accel.methods.rectified import Rectified
from dit_accel.methods.rettention import Rettention
from dit_accel.methods.reuse import Reuse
from dit_accel.methods.shared import SharedResidual
from dit_accel.methods.sla import SLA
from dit_accel.methods.topk import TopK
from dit_accel.pruning.config import TokenPruning
from dit_accel.pruning.criteria import CRITERIA
from dit_accel.schedule import Schedule

KEEPS = (0.05, 0.1, 0.2, 0.3, 0.5)
FEWER = (0.8, 0.66, 0.5, 0.4, 0.3)
PRUNED = 0.5
PRUNING = "token pruning"  # the family of its rows, which are criteria at one keep: no line
UNTRAINED = "sla-untrained"  # top-k exactly, so its cells are top-k's
EIGHT = "topk-int8"
_METHODS: dict[str, Callable[[float], Method]] = {
    "topk": TopK,
    UNTRAINED: TopK,
    EIGHT: partial(TopK, precision="int8"),
    "pooled": Pooled,
    "rectified": partial(Rectified, gapr=False),
    "rectified-gapr": Rectified,
    "rettention": Rettention,
    "shared": SharedResidual,
    "ditfastattn": partial(Rettention, rescale=False),
}
ADDED = {
    "prune": False,
    "cache": True,
    "reuse": True,
    "passes": False,
}  # and whether it takes a value
DEFAULT = ("steps", *(name for name in _METHODS if name != EIGHT), "prune")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name: of the line.
    family: rows that a plot joins by a line.
    config: of the run.
    steps: of the run; None takes as many as the dense reference.
    transformer: folder of fine-tuned weights to run instead of the model's, or of a LoRA to run on
        them.
    rank: rows of a low one are measured first.
    boost: what runs beside the method.
    """

    name: str
    family: str
    config: AccelConfig
    steps: int | None = None
    transformer: str | None = None
    rank: int = 0
    boost: Boost = Boost()

    @property
    def digest(self) -> str:
        """Same configuration, learned weights, boost and steps, same digest."""
        beside = [] if self.boost == Boost() else [asdict(self.boost)]
        facts: list[Any] = [self.config.to_dict(), self.steps, *beside]
        younger = ((facts[0], "dense"), (facts[-1], "quantize"), (facts[-1], "graphs"))
        for part, name in younger:  # than some cells
            if isinstance(part, dict) and part.get(name, 0) in (None, False):
                del part[name]
        text = json.dumps(facts, sort_keys=True).encode()
        learned = b"".join(path.read_bytes() for path in self.config.method.files)
        parts = sorted(Path(self.transformer).iterdir()) if self.transformer else []
        known = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
        learned += repr(known).encode() if known else b""
        return hashlib.sha256(text + learned).hexdigest()[:12]


def rows(
    names: Sequence[str],
    keeps: Sequence[float],
    steps: int,
    template: AccelConfig,
    sla: Sequence[str] = (),
) -> list[Row]:
    """The rows of these names, the controls included where they are named.

    names: "steps" (dense with fewer steps), "prune" (token pruning, every criterion), a
    generation.variant of a method of `DEFAULT`, "topk-int8" or "dense", else a preset or preset
    file; "+prune" and "+cache@0.1" (a step cache and its threshold) may be added to these.
    keeps: of methods whose name tells none; the first is measured first, in all methods.
    template: schedule, order and min_tokens of the method rows. sla: learned weights, each a row
    for every keep; or a folder that fine-tuning wrote, a row at the keep it was trained for; the
    same may be added to them. Raises ValueError for a name or a keep that is none, and for no rows
    at all.
    """
    found: list[Row] = []
    for name in names:
        if name == "steps":
            found += _fewer(steps)
        elif name == "prune":
            found += [replace(row, rank=len(keeps) + 1) for row in _pruned(template)]
        elif re.split("[/@+]", name)[0] in (*_METHODS, "dense") and ".json" not in name:
            found += _combined(name, keeps, template)
        else:
            found += _preset(name)
    learned: list[tuple[str, Row]] = []
    for path in dict.fromkeys(sla):
        path, *added = _split(path)
        parts = additions("+".join((path, *added)), added, ADDED)
        config, boost = _adding(parts, template)
        made = _boosted(_learned(Path(path), keeps, config), "sla", added, boost)
        learned += [(path, row) for row in made]
    called = Counter(row.name for _, row in learned)
    found += [
        replace(row, name=f"{row.name} ({path})") if called[row.name] > 1 else row
        for path, row in learned
    ]
    unique = {row.name: row for row in found}
    if not unique:
        raise ValueError(f"no rows are named: give some of {', '.join(DEFAULT)}")
    return list(unique.values())


def _fewer(steps: int) -> list[Row]:
    counts = sorted({max(1, round(steps * share)) for share in FEWER} - {steps}, reverse=True)
    dense = AccelConfig(Dense(), Schedule(warmup=0))
    return [Row(f"dense, {n} of {steps} steps", "fewer steps", dense, n) for n in counts]


def _pruned(template: AccelConfig) -> list[Row]:
    dense = replace(template, method=Dense())
    return [
        Row(
            f"pruning {PRUNED:.0%}, {criterion}",
            PRUNING,
            replace(dense, prune=TokenPruning(keep=PRUNED, criterion=criterion)),
        )
        for criterion in CRITERIA
    ]


def _combined(name: str, keeps: Sequence[float], template: AccelConfig) -> list[Row]:
    """A method, or dense attention, with what a name adds to it."""
    variant = Variant.parse(name, ADDED)
    _, *added = name.split("+")
    template, boost = _adding(variant.parts, template)
    if variant.base == "dense":
        if not variant.plain:
            raise ValueError(f"row {name!r} chooses blocks: dense attention has none to choose")
        return [Row(name, name, template, boost=boost)]
    base = variant.base if variant.select is None else f"{variant.base}/{variant.select}"

    steps, passes = variant.parts.get("reuse"), "passes" in variant.parts
    reuse = Reuse(int(steps or 1), passes)

    def build(keep: float) -> Method:
        method = replace(variant, keep=keep).of(_METHODS[variant.base](keep))
        return replace(method, reuse=reuse)

    rows = _at_each(base, build, keeps if variant.keep is None else [variant.keep], template)
    return _boosted(rows, base, added, boost)


def _split(name: str) -> list[str]:
    """A path, or another name, and what is added to it; a path may hold a "+" of its own."""
    parts = name.split("+")
    for count in range(len(parts), 0, -1):
        if Path("+".join(parts[:count])).exists():
            return ["+".join(parts[:count]), *parts[count:]]
    return parts


def _preset(name: str) -> list[Row]:
    """A preset or a preset file, and what is added to it."""
    base, *added = _split(name)
    config = resolve(base)
    prune, boost = _beside(additions(name, added, ADDED), config)
    row = Row(base, base, replace(config, prune=prune))
    return _boosted([row], base, added, boost)


def _beside(
    parts: Mapping[str, float | None], config: AccelConfig
) -> tuple[TokenPruning | None, Boost]:
    """What a name adds: which tokens are pruned, and the boost."""
    prune = TokenPruning(keep=PRUNED) if "prune" in parts else config.prune
    cache = parts.get("cache")
    boost = Boost(step_cache=0.1 if cache is None else cache) if "cache" in parts else Boost()
    return prune, boost


def _adding(parts: Mapping[str, float | None], template: AccelConfig) -> tuple[AccelConfig, Boost]:
    """The template, its method still to come, and the boost with what a name adds."""
    prune, boost = _beside(parts, template)
    return replace(template, method=Dense(), prune=prune), boost


def _boosted(rows: list[Row], base: str, added: Sequence[str], boost: Boost) -> list[Row]:
    tail, family = "".join(f" + {part}" for part in added), "+".join((base, *added))
    return [replace(row, name=row.name + tail, family=family, boost=boost) for row in rows]


def _at_each(
    name: str, build: Callable[[float], Method], keeps: Sequence[float], template: AccelConfig
) -> list[Row]:
    return [
        Row(
            f"{name} {keep:.0%}",
            name,
            replace(template, method=build(keep)),
            rank=1 + list(keeps).index(keep),
        )
        for keep in sorted(keeps)
    ]


def _learned(path: Path, keeps: Sequence[float], template: AccelConfig) -> list[Row]:
    """SLA with learned weights: a file of them, or the folder of a fine-tuning run."""
    if not path.is_dir():
        return _at_each("sla", partial(SLA, weights=str(path)), keeps, template)
    preset, weights = path / "preset.json", path / "sla.safetensors"
    if not (preset.is_file() and weights.is_file()):
        raise ValueError(f"{path} is no result of fine-tuning: it lacks {preset.name}")
    method = resolve(preset).method
    models = [str(path / name) for name in ("transformer", "lora") if (path / name).is_dir()]
    return [
        Row(
            f"sla {method.keep:.0%}, {path.name}",
            "sla",
            replace(template, method=method),
            transformer=models[0] if models else None,
        )
    ]
