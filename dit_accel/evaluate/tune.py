"""From a wish (a PSNR, or a speed-up) to a preset file, on the user's own prompts.

One dense run measures how much each layer minds being sparse, or a profile has it. One number, the
largest error a layer may make, then decides every layer's keep and which layers stay dense; it is
found by bisection over whole generations, for each method and warm-up. The result is tried on
prompts that took no part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dit_accel.config import AccelConfig, named
from dit_accel.evaluate.profiled import (
    Addition,
    Way,
    additions,
    begun,
    check_profile,
    read,
)
from dit_accel.evaluate.rows import Row
from dit_accel.evaluate.sensitivity import Sensitivity, measure
from dit_accel.evaluate.study import Study
from dit_accel.generation.run import ProgressFn
from dit_accel.inputs import fields
from dit_accel.media.files import atomic
from dit_accel.methods import Method
from dit_accel.methods.dense import Dense
from dit_accel.methods.learned import Learned
from dit_accel.pages.scatter import Point, scatter
from dit_accel.schedule import FEW_STEPS, Schedule, count_steps

KEEPS = (0.1, 0.2, 0.3, 0.5)
METHODS = ("pooled", "topk")
WARMUPS = (0.15, 0.3, 0.45)
# Of few steps `shared` is the closest, and a dense step in front is worth much.
FEW_METHODS = ("shared", *METHODS)
FEW_WARMUPS = (1, 2, 0)
ORDERS = "orders.json"  # the profile of a preset's orders, beside it
FILES = ("preset.json", "tuning.json", "frontier.svg", ORDERS)
CHOICES = 15  # values of the error limit that are tried for: four generations find the best one


@dataclass(frozen=True)
class Goal:
    """At least this PSNR to dense in dB, as fast as can be; or this speed-up, as close as can be.

    Raises ValueError unless exactly one is given, in its range.
    """

    psnr: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        fields.check(self)
        if (self.psnr is None) == (self.speedup is None):
            raise ValueError("tune towards one goal: a PSNR (psnr=35) or a speed-up (speedup=2)")
        if self.psnr is not None and not 5 <= self.psnr < 100:
            raise ValueError(f"the PSNR to reach lies in [5, 100) dB, not {self.psnr:g}")
        if self.speedup is not None and not 1 < self.speedup <= 100:
            raise ValueError(f"the speed-up to reach lies in (1, 100], not {self.speedup:g}")

    def met(self, trial: Trial) -> bool:
        if self.psnr is not None:
            return trial.psnr >= self.psnr
        return self.speedup is not None and trial.speedup >= self.speedup

    def rank(self, trial: Trial) -> float:
        """Smaller is better among those that meet the goal."""
        return trial.work if self.psnr is not None else -trial.psnr

    def __str__(self) -> str:
        return f"{self.psnr:g} dB" if self.psnr is not None else f"{self.speedup:g}× speed-up"


@dataclass(frozen=True)
class Trial:
    """One configuration over all prompts and seeds: mean and worst PSNR, mean work and speed-up."""

    row: Row
    psnr: float
    worst: float
    work: float
    speedup: float

    def to_dict(self) -> dict[str, Any]:
        figures = {k: getattr(self, k) for k in ("psnr", "worst", "work", "speedup")}
        return {"name": self.row.name, **figures, "config": self.row.config.to_dict()}


@dataclass
class Search:
    """What was tried. `trials` is how many whole configurations may be."""

    study: Study
    goal: Goal
    prompts: Sequence[str]
    seeds: Sequence[int]
    budget: int
    progress: ProgressFn
    note: Callable[[str], None]
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        met = [trial for trial in self.trials if self.goal.met(trial)]
        return min(met, key=self.goal.rank, default=None)

    def climb(self, way: Way, added: Sequence[Addition], warmups: Sequence[float | int]) -> None:
        """A way at the first warm-up; then with each addition, which stays if it is better; then
        at the other warm-ups."""
        found = self.bisect(way, warmups[0])
        for add in added:
            other = add(way)
            again = None if other is None else self.bisect(other, warmups[0])
            if other is None or again is None:
                continue
            if found is None or self.goal.rank(again) < self.goal.rank(found):
                way, found = other, again
        for warmup in warmups[1:]:
            self.bisect(way, warmup)

    def bisect(self, way: Way, warmup: float | int) -> Trial | None:
        """The best trial that meets the goal: that of the largest error limit that reaches the
        PSNR, or of the smallest that is fast enough. None: there is none, or none that beats the
        best one so far."""
        limits, before = _thinned(way.felt.limits()), len(self.trials)
        low, high = -1, len(limits)
        while high - low > 1 and len(self.trials) < self.budget:
            if self._hopeless(way, warmup, limits[high - 1]):
                break
            middle = (low + high) // 2
            trial = self._try(way, warmup, limits[middle])
            if self.goal.met(trial) == (self.goal.psnr is not None):
                low = middle
            else:
                high = middle
        met = [trial for trial in self.trials[before:] if self.goal.met(trial)]
        return min(met, key=self.goal.rank, default=None)

    def _hopeless(self, way: Way, warmup: float | int, limit: float) -> bool:
        """Whether even the cheapest choice that is left costs more than the best one so far."""
        if self.best is None or self.goal.psnr is None:
            return False
        steps, share, keep = self.study.steps, self.study.share, way.template.method.keep
        kept = way.felt.planned(way.at(warmup, steps).schedule, limit, keep, steps)
        return share * kept + 1 - share >= self.best.work

    def _try(self, way: Way, warmup: float | int, limit: float) -> Trial:
        template = way.at(warmup, self.study.steps)
        schedule = way.felt.schedule(template.schedule, limit)
        name = f"{way.name}, warm-up {warmup:g}, error ≤ {limit:.3f}"
        row = Row(name, template.method.name, replace(template, schedule=schedule))
        self.progress("trying configurations", len(self.trials), self.budget)
        trial = score(self.study, row, self.prompts, self.seeds)
        self.trials.append(trial)
        self.note(f"{name}: {trial.psnr:.1f} dB, {trial.work:.0%} work, {trial.speedup:.2f}×")
        return trial


def tune(
    study: Study,
    goal: Goal,
    prompts: Sequence[str],
    held_out: Sequence[str],
    template: AccelConfig,
    *,
    seeds: Sequence[int] = (0,),
    methods: Sequence[str] | None = None,
    warmups: Sequence[float | int] | None = None,
    keeps: Sequence[float] | None = None,
    trials: int = 24,
    profile: str | Path | None = None,
    command: str = "",
    progress: ProgressFn = lambda phase, done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, object]:
    """Find a configuration that meets the goal, and write it where `accelerate` can load it.

    Every generation is booked in the study's folder, so an interrupted search goes on where it
    stopped. Returns what tuning.json holds; "chosen" is None when no trial met the goal, and then
    no preset is written. Files: preset.json, tuning.json, frontier.svg. profile: a file of
    `dit-accel profile`, in place of the dense run in which the methods run, too; its selector, its
    orders of the heads' tokens and its keeps of the heads are tried, and more in the early steps.
    methods, warmups (shares or numbers of steps): to try; None: the usual. keeps: that a layer can
    get; None: the usual, or the profile's. Raises ValueError for a prompt in both lists, a model
    that attends densely whatever it is told, a profile of another model or without these keeps.
    """
    check_search(prompts, held_out, methods, warmups, keeps, trials, profile)
    search = Search(study, goal, prompts, seeds, trials, progress, note)
    tried, felt = warmups_of(warmups, study.steps, _own(study) is not None), {}
    known = None if profile is None else read(profile, keeps)
    if known is not None and profile is not None:
        check_profile(known, profile, study.pipe)
    for name, method in _candidates(study, methods).items():
        config = replace(template, method=method, schedule=Schedule(warmup=tried[0]))
        if known is None or profile is None:
            grid = KEEPS if keeps is None else keeps
            errors = _sensitivity(study, config, prompts[0], seeds[0], grid, progress)
            way, added = Way(method.name, config, errors), []
        else:
            way, added = begun(known, name, config), additions(known, profile, name)
        felt[name] = way.felt
        search.climb(way, added, tried)
    progress("trying configurations", trials, trials)
    data = {
        "command": command,
        "setting": study.setting,
        "goal": {"psnr": goal.psnr, "speedup": goal.speedup},
        "prompts": list(prompts),
        "held_out": list(held_out),
        "seeds": list(seeds),
        "profile": None if profile is None else str(profile),
        **_chosen(search, held_out),
        "frontier": [trial.to_dict() for trial in frontier(search.trials)],
        "trials": [trial.to_dict() for trial in search.trials],
        "sensitivity": {name: found.to_dict() for name, found in felt.items()},
    }
    _write(study, data)
    return data


def _own(study: Study) -> Method | None:
    """The method that the checkpoint in the pipeline was trained for; None: there is none."""
    own = study.trained.method if study.trained is not None else None
    return None if isinstance(own, Dense) else own


def _candidates(study: Study, methods: Sequence[str] | None) -> dict[str, Method]:
    """By name, None: the usual; that of the pipeline's checkpoint before others, if it chooses
    blocks by a share and can be tried in the middle of a dense run, which tiles and gates cannot.
    """
    usual = FEW_METHODS if study.steps <= FEW_STEPS else METHODS
    found = {name: named(name) for name in (usual if methods is None else methods)}
    own = _own(study)
    if own is None or own.keep == 1 or own.reads_input or own.layout is not None:
        return found
    return {"checkpoint": own} | found


def _save(config: AccelConfig, folder: Path) -> None:
    """preset.json, and beside it what a checkpoint's method has learned, and the profile that its
    orders are read from."""
    data, method = config.to_dict(), config.method
    if isinstance(method, Learned) and method.weights is None and method.tensors():
        data["method"]["weights"] = f"{method.name}.safetensors"
        with atomic(folder / data["method"]["weights"]) as temporary:
            method.save(temporary)
    for path in method.sorting.files:
        data["method"]["sort"] = f"per-head({ORDERS})"
        with atomic(folder / ORDERS) as temporary:
            temporary.write_bytes(path.read_bytes())
    with atomic(folder / "preset.json") as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def warmups_of(
    warmups: Sequence[float | int] | None, steps: int, trained: bool = False
) -> list[float | int]:
    """Those of different numbers of steps, the smallest first; None: the usual ones, which in a run
    of few steps begin with one step, for a model that was trained for its method with none."""
    if warmups is None and steps <= FEW_STEPS:
        usual = sorted(FEW_WARMUPS) if trained else FEW_WARMUPS
        return [count for count in usual if count < steps]
    found = {count_steps(warmup, steps): warmup for warmup in reversed(warmups or WARMUPS)}
    return [found[count] for count in sorted(found)]


def _chosen(search: Search, held_out: Sequence[str]) -> dict[str, object]:
    """The best trial, tried on the held-out prompts and written as a preset; None if there is no
    such trial."""
    best, study = search.best, search.study
    if best is None:
        (study.folder / "preset.json").unlink(missing_ok=True)  # of an earlier goal
        return {"chosen": None, "on_held_out": None}
    search.progress("prompts it did not see", 0, None)
    unseen = score(study, best.row, held_out, search.seeds)
    _save(best.row.config, study.folder)
    return {"chosen": best.to_dict(), "on_held_out": unseen.to_dict()}


def score(study: Study, row: Row, prompts: Sequence[str], seeds: Sequence[int]) -> Trial:
    """A row over all prompts and seeds; ValueError when it is refused or runs all dense."""
    cells = [study.cell(row, prompt, seed) for prompt in prompts for seed in seeds]
    for cell in cells:
        if "error" in cell:
            raise ValueError(f"{row.name} cannot run: {cell['error']}")
        if cell["unplanned"] and cell["attention_kept"] >= 1:
            raise ValueError(f"nothing ran sparse, so there is nothing to tune: {_why(cell)}")
    psnr = [cell["psnr"] for cell in cells]
    return Trial(
        row,
        fmean(psnr),
        min(psnr),
        fmean(cell["work_kept"] for cell in cells),
        fmean(cell["speedup"] for cell in cells),
    )


def frontier(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other one beats in both work and PSNR, by rising work."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.work, -t.psnr)):
        if not best or trial.psnr > best[-1].psnr:
            best.append(trial)
    return best


def check_search(
    prompts: Sequence[str],
    held_out: Sequence[str],
    methods: Sequence[str] | None,
    warmups: Sequence[float | int] | None,
    keeps: Sequence[float] | None,
    trials: int,
    profile: str | Path | None = None,
) -> None:
    """ValueError for a search that cannot be made, whatever the model."""
    both = sorted(set(prompts) & set(held_out))
    if both:
        raise ValueError(f"the prompt {both[0]!r} is held out and tuned on: take it from one list")
    if not prompts or not held_out:
        raise ValueError("tuning needs prompts to tune on and others to check with")
    if trials < 1:
        raise ValueError(f"trials is a number ≥ 1, not {trials}")
    grid = KEEPS if keeps is None else keeps
    methods = METHODS if methods is None else methods
    warmups = WARMUPS if warmups is None else warmups
    for what, values in (("methods", methods), ("warmups", warmups), ("keeps", grid)):
        if not values:
            raise ValueError(f"{what} names none: leave it out, or name some")
    if profile is not None:
        read(profile, keeps)
    for name in methods:
        for keep in grid:
            replace(named(name), keep=keep)
    for warmup in warmups:
        Schedule(warmup=warmup)


def _sensitivity(
    study: Study,
    config: AccelConfig,
    prompt: str,
    seed: int,
    keeps: Sequence[float],
    progress: ProgressFn,
) -> Sensitivity:
    row = Row("sensitivity", config.method.name, config)
    key = f"sensitivity {list(keeps)} {study.key(row, prompt, seed)}"
    known = study.journal.lines.get(key)
    if known is None:
        request = replace(study.base, prompt=prompt, seed=seed)

        def named_progress(phase: str, done: int, total: int | None) -> None:
            progress(f"layers of {config.method.name}: {phase}", done, total)

        felt = measure(study.pipe, study.defaults, request, config, keeps, named_progress)
        known = study.journal.add(key, {"errors": felt.to_dict()})
    return Sensitivity.from_dict(known["errors"])


def _thinned(limits: Sequence[float]) -> list[float]:
    """At most CHOICES of them, the first and the last included."""
    if len(limits) <= CHOICES:
        return list(limits)
    return [limits[round(i * (len(limits) - 1) / (CHOICES - 1))] for i in range(CHOICES)]


def _why(cell: dict[str, Any]) -> str:
    return "; ".join(cell["unplanned"])


def _write(study: Study, data: dict[str, Any]) -> None:
    with atomic(study.folder / "tuning.json") as temporary:
        temporary.write_text(json.dumps(data, indent=1, default=str) + "\n", "utf-8")
    best = [Point("frontier", t["name"], t["work"] * 100, t["psnr"]) for t in data["frontier"]]
    tried = [
        Point(t["name"].partition(",")[0], t["name"], t["work"] * 100, t["psnr"])
        for t in data["trials"]
        if t not in data["frontier"]
    ]
    with atomic(study.folder / "frontier.svg") as temporary:
        loose = [point.family for point in tried]
        drawn = scatter([*best, *tried], "work kept (% of FLOPs)", "PSNR to dense (dB)", 100, loose)
        temporary.write_text(drawn, encoding="utf-8")
