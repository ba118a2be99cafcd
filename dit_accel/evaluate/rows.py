"""The lines of the comparison: which configurations, at which keep, and their controls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dit_accel.config import AccelConfig, resolve
from dit_accel.generation.boost import Boost
from dit_accel.methods import Method, find
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
    "topk": lambda keep: find("topk")(keep),
    UNTRAINED: lambda keep: find("topk")(keep),
    EIGHT: lambda keep: find("topk")(keep, precision="int8"),
    "pooled": lambda keep: find("pooled")(keep),
    "rectified": lambda keep: find("rectified")(keep, gapr=False),
    "rectified-gapr": lambda keep: find("rectified")(keep),
    "rettention": lambda keep: find("rettention")(keep),
    "shared": lambda keep: find("shared")(keep),
    "ditfastattn": lambda keep: find("rettention")(keep, rescale=False),
}
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
        facts = [self.config.to_dict(), self.steps, *beside]
        text = json.dumps(facts, sort_keys=True).encode()
        weights = getattr(self.config.method, "weights", None)
        learned = Path(weights).read_bytes() if weights else b""
        parts = sorted(Path(self.transformer).iterdir()) if self.transformer else []
        facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
        learned += repr(facts).encode() if facts else b""
        return hashlib.sha256(text + learned).hexdigest()[:12]


def rows(
    names: Sequence[str],
    keeps: Sequence[float],
    steps: int,
    template: AccelConfig,
    sla: Sequence[str] = (),
) -> list[Row]:
    """The rows of these names, the controls included where they are named.

    names: "steps" (dense with fewer steps), "prune" (token pruning, every criterion), a method of
    `DEFAULT`, "topk-int8" or "dense", to which "+prune" and "+cache@0.1" (First-Block-Cache and its
    threshold) may be added, else a preset or preset file. keeps: the first is measured first, in
    all methods.
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
        elif name.partition("+")[0] in (*_METHODS, "dense"):
            found += _combined(name, keeps, template)
        else:
            found.append(Row(name, name, resolve(name)))
    for path in sla:
        path, *added = [path] if Path(path).exists() else path.split("+")
        config, boost = _adding("+".join((path, *added)), added, template)
        family = "+".join(("sla", *added))
        found += _boosted(_learned(Path(path), keeps, config), added, boost, family)
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


def _combined(name: str, keeps: Sequence[float], template: AccelConfig) -> list[Row]:
    """A method, or dense attention, with what a name adds to it."""
    base, *added = name.split("+")
    template, boost = _adding(name, added, template)
    if base == "dense":
        return [Row(name, name, template, boost=boost)]
    rows = _at_each(base, _METHODS[base], keeps, template)
    return _boosted(rows, added, boost, name)


def _adding(name: str, added: Sequence[str], template: AccelConfig) -> tuple[AccelConfig, Boost]:
    """The template, its method still to come, and the boost with what a name adds."""
    template, boost = replace(template, method=find("dense")()), Boost()
    for part in added:
        what, _, threshold = part.partition("@")
        if part == "prune":
            template = replace(template, prune=TokenPruning(keep=PRUNED))
        elif what == "cache":
            boost = Boost(step_cache=_number(name, threshold or "0.1"))
        else:
            raise ValueError(f"row {name!r} adds {part!r}; it can add prune and cache@0.1")
    return template, boost


def _boosted(rows: list[Row], added: Sequence[str], boost: Boost, family: str) -> list[Row]:
    tail = "".join(f" + {part}" for part in added)
    return [replace(row, name=row.name + tail, family=family, boost=boost) for row in rows]


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"row {name!r} has the threshold {text!r}; write cache@0.1") from None


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
        weights = str(path)
        return _at_each("sla", lambda keep: find("sla")(keep, weights=weights), keeps, template)
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
