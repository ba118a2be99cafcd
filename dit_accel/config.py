"""AccelConfig: everything `accelerate` needs to know, validated, with a JSON round trip."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from dit_accel.forward.order import ORDERS, Grid
from dit_accel.inputs.data import read_object
from dit_accel.inputs.fields import build, check, expect
from dit_accel.methods import Method, find
from dit_accel.pruning.config import TokenPruning
from dit_accel.schedule import Schedule

DEFAULT = "shared"  # the method nearest to dense at equal kept work, see docs/results.md


@dataclass(frozen=True)
class AccelConfig:
    """What to run, when, and in which token order.

    Args:
        method: a method object such as TopK(keep=0.2).
        schedule: which steps and layers stay dense.
        order: "raster", "tile", "hilbert" or "time": how visual tokens are laid out in blocks.
        tile: (t, h, w) tokens of a tile for order="tile".
        min_tokens: below this many tokens attention stays dense; None takes the device's measured
            crossover (see dit_accel.config.CROSSOVER).
        strict: raise RuntimeError where a layer would fall back to dense unplanned.
        prune: which tokens run through the middle of the model; None: all of them, always.
        dense: backend of dense attention (ops/backends.py): a name, or "auto" for the fastest exact
            one at hand; None: the one that the pipeline has.
    """

    method: Method
    schedule: Schedule = field(default_factory=Schedule)
    order: str = "raster"
    tile: Grid = (1, 8, 8)
    min_tokens: int | None = None
    strict: bool = False
    prune: TokenPruning | None = None
    dense: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(f"method is a dit_accel method, not {type(self.method).__name__}")
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule is a dit_accel.Schedule, not {type(self.schedule).__name__}")
        if self.prune is not None and not isinstance(self.prune, TokenPruning):
            raise TypeError(f"prune is a dit_accel.TokenPruning, not {type(self.prune).__name__}")
        if self.prune is not None and self.method.stateful:
            raise ValueError(
                f"{self.method.name} keeps a state of all tokens, so it cannot run on pruned ones; "
                "take another method or prune=None"
            )
        check(self)
        self._check_choice()
        if self.method.layout is not None:
            self._lay_out(self.method.layout)
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}: choose one of {', '.join(ORDERS)}")
        object.__setattr__(self, "tile", tuple(self.tile))
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"tile is three sizes (t, h, w) ≥ 1, not {self.tile}")
        if self.min_tokens is not None and self.min_tokens < 0:
            raise ValueError(f"min_tokens is ≥ 0 or None, not {self.min_tokens}")

    def _check_choice(self) -> None:
        """ValueError where blocks cannot be chosen so."""
        selector = self.method.selector
        if self.prune is not None and self.method.sorting.placed:
            raise ValueError(
                f"sort={self.method.sort} looks where tokens lie in the picture, so it cannot run "
                "on pruned ones; take clusters, none, or prune=None"
            )
        if self.prune is not None and selector.placed:
            raise ValueError(
                f"the selector {selector} looks where tokens lie in the picture, so it cannot run "
                "on pruned ones; take another selector or prune=None"
            )
        for what in self.method.places if self.prune is not None else ():
            raise ValueError(
                f"{what} looks where tokens lie in the picture, so it cannot run on pruned ones; "
                "take another or prune=None"
            )
        if self.schedule.head_keep and not (self.method.chooses and selector.counted):
            name = self.method.name if not self.method.chooses else f"the selector {selector}"
            raise ValueError(f"{name} reads the same blocks for all heads: no head_keep")

    def _lay_out(self, tile: Grid) -> None:
        """The order of a method that says how its tokens are laid out."""
        name = self.method.name
        if self.prune is not None:
            raise ValueError(
                f"{name} needs whole tiles of tokens: take another method or prune=None"
            )
        if self.order not in ("raster", "tile"):
            raise ValueError(f"{name} lays tokens out in its own tiles: leave the order out")
        object.__setattr__(self, "order", "tile")
        object.__setattr__(self, "tile", tile)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` reads it back to an equal object."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        method = self.method
        choice = {name: str(getattr(method, name)) for name in method.texts}
        out["method"] = {"name": method.name, **asdict(method), **choice}
        for name in method.later:  # what ran before there was one is the same
            if getattr(method, name) == type(method).__dataclass_fields__[name].default:
                del out["method"][name]
        out["schedule"] = asdict(self.schedule)
        out["prune"] = None if self.prune is None else asdict(self.prune)
        return json.loads(json.dumps(out))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AccelConfig:
        """Inverse of `to_dict`; ValueError names an unknown key."""
        data = dict(data)
        method = data.pop("method", {})
        expect("method", method, dict)
        name = method.get("name", DEFAULT)
        expect("the name of the method", name, str)
        own = {key: value for key, value in method.items() if key != "name"}
        parts = {"method": build(find(name), own, "method")}
        if "schedule" in data:
            parts["schedule"] = build(Schedule, data.pop("schedule"), "schedule")
        if data.get("prune") is not None:
            parts["prune"] = build(TokenPruning, data.pop("prune"), "prune")
        return build(cls, {**data, **parts})

    def save(self, path: str | Path) -> None:
        """Write a preset file that `accelerate(pipe, "file.json")` loads."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        Path(path).write_text(text, encoding="utf-8")


class Options(TypedDict, total=False):
    """What `accelerate` takes beside a method, each in place of the configuration's own."""

    schedule: Schedule | None
    prune: TokenPruning | str | None
    order: str | None
    min_tokens: int | None
    strict: bool | None
    dense: str | None


def resolve(method: str | Path | Method | AccelConfig, **overrides: object) -> AccelConfig:
    """A configuration from a text that `named` reads, a .json file, a method or a config.

    `overrides` replaces fields of the result where its value is not None.
    """
    changed: dict[str, Any] = {k: v for k, v in overrides.items() if v is not None}
    if isinstance(method, AccelConfig):
        return replace(method, **changed)
    if isinstance(method, Method):
        return AccelConfig(method, **changed)
    if not isinstance(method, (str, Path)):
        raise TypeError(
            "method is a name, a preset file, a method object or an AccelConfig, "
            f"not {type(method).__name__}"
        )
    if str(method).endswith(".json"):
        return replace(_read(Path(method)), **changed)
    return AccelConfig(named(str(method)), **changed)


def named(text: str) -> Method:
    """The method of a text: a name, and what of "/selector", ":preset" and "@keep" follows it, such
    as "topk", "shared/sub:fast" or "pooled/sub(8)@0.1"."""
    text, at, keep = text.partition("@")
    text, colon, preset = text.partition(":")
    name, slash, selector = text.partition("/")
    kind = find(name)
    if colon and preset not in kind.presets:
        have = ", ".join(f"{name}:{p}" for p in kind.presets) or "none"
        raise ValueError(f"method {name!r} has no preset {preset!r}: it has {have}")
    method = kind(**kind.presets[preset]) if colon else kind()
    if slash:
        method = replace(method, select=selector)
    if not at:
        return method
    try:
        return replace(method, keep=float(keep))
    except ValueError as error:
        raise ValueError(f"{keep!r} after @ is no share to keep: {error}") from None


def _read(path: Path) -> AccelConfig:
    data = read_object(path, "preset file")
    method = data.get("method")
    if isinstance(method, dict):
        texts = {name: x for name, x in method.items() if isinstance(x, str)}
        moved = {name: _moved(path, texts[name]) for name in {"weights"} & set(texts)}
        for name in {"select", "sort"} & set(texts):
            moved[name] = re.sub(
                r"(?<=[(=])([^()=]+\.(?:json|safetensors))(?=[,)])",
                lambda file: _moved(path, file[1]),
                texts[name],
            )
        data["method"] = {**method, **moved}
    try:
        return AccelConfig.from_dict(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"preset file {path}: {error}") from None


def _moved(preset: Path, name: str) -> str:
    """A file that a preset names: the one beside it, wherever the folder has moved."""
    beside = preset.parent / Path(name).name
    there = Path(name).is_absolute() and os.path.isfile(name)
    return str(beside) if os.path.isfile(beside) and not there else name


# Tokens below which dense attention is the faster one. cpu: `dit-accel bench --crossover` on two
# cores; cuda: whole models on an H100 at keep 0.1, where a sparse step of LTX (6,144 tokens) and of
# Qwen-Image (6,953) is 12 to 15 % faster, one of Flux (4,608) 0 to 4 %
# (benchmarks/results/h100-e2e-short.json).
CROSSOVER = {"cpu": 512, "cuda": 6144}
