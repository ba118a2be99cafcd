"""When attention is sparse: pure data, (step, layer) → dense | sparse(keep). No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from dit_accel.inputs import fields

FEW_STEPS = 8  # of so many or fewer each dense step is a great share of the run


class Action(NamedTuple):
    """What one layer does at one step. `keep` is None for dense, or a share for each head; `reason`
    says why it is dense."""

    keep: float | tuple[float, ...] | None
    reason: str = ""
    refresh: bool = False


def check_share(name: str, value: float | int) -> None:
    """ValueError unless `value` is a share of the steps (float) or a number of them (int)."""
    fields.expect(name, value, float)
    if value < 0 or (isinstance(value, float) and value > 1):
        raise ValueError(f"{name} is a share of the steps in [0, 1] or a number ≥ 0, not {value!r}")


def count_steps(value: float | int, steps: int) -> int:
    """How many of `steps` a share or a number stands for; a share is rounded up."""
    # 0.14 * 50 is 7.000000000000001 in floating point, and means 7 steps
    return ceil(value * steps - 1e-6) if isinstance(value, float) else value


@dataclass(frozen=True)
class Schedule:
    """Which steps and layers stay dense, and how much the others keep.

    Args:
        warmup: dense steps at the start, as a share of the run (float in [0, 1)) or a number (int).
        cooldown: dense steps at the end, likewise.
        dense_layers: indices of layers that are always dense; negative ones count from the last.
        layer_keep: (layer, keep) pairs that replace the method's `keep` on those layers.
        head_keep: (layer, keeps) pairs with a keep for each head of a layer, before layer_keep's:
            what `dit-accel profile` finds.
        step_keep: (start, keep) pairs, each a `keep` from that share or number of the steps on,
            until the next; a layer's or head's own is scaled alike. Most of a clip's error comes
            from its first sparse steps: keep much there, and little later.
        refresh: methods with a state rebuild it at the first sparse step and then every
            `refresh` steps, or at the steps of a tuple of shares and numbers; None leaves it to the
            method.

    The first steps decide the picture's layout, so a run with no dense step at all ends in another
    picture; a share (not a number) keeps few-step models fast: 15 % of 4 steps is one, of 8 two.
    Raises ValueError for a value outside its range.
    """

    warmup: float | int = 0.15
    cooldown: float | int = 0
    dense_layers: tuple[int, ...] = ()
    layer_keep: tuple[tuple[int, float], ...] = ()
    head_keep: tuple[tuple[int, tuple[float, ...]], ...] = ()
    step_keep: tuple[tuple[float | int, float], ...] = ()
    refresh: int | tuple[float | int, ...] | None = None

    def __post_init__(self) -> None:
        fields.check(self)
        for name in ("warmup", "cooldown"):
            check_share(name, getattr(self, name))
        object.__setattr__(self, "dense_layers", tuple(int(i) for i in self.dense_layers))
        pairs = tuple((int(i), float(keep)) for i, keep in self.layer_keep)
        object.__setattr__(self, "layer_keep", pairs)
        for layer, keep in pairs:
            if not 0 < keep <= 1:
                raise ValueError(f"layer_keep of layer {layer} lies in (0, 1], not {keep}")
        heads = tuple((int(i), tuple(map(float, keeps))) for i, keeps in self.head_keep)
        object.__setattr__(self, "head_keep", heads)
        for layer, keeps in heads:
            if not keeps or not all(0 < keep <= 1 for keep in keeps):
                raise ValueError(f"head_keep of layer {layer} lies in (0, 1], not {keeps}")
        curve = tuple((start, float(keep)) for start, keep in self.step_keep)
        object.__setattr__(self, "step_keep", curve)
        for start, keep in curve:
            check_share("a start of step_keep", start)
            if not 0 < keep <= 1:
                raise ValueError(f"step_keep from {start} on lies in (0, 1], not {keep}")
        if isinstance(self.refresh, list | tuple):
            object.__setattr__(self, "refresh", tuple(self.refresh))
            for start in self.refresh:
                check_share("a step of refresh", start)
        elif self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh is a number of steps ≥ 1 or None, not {self.refresh}")

    def dense_at(self, step: int, steps: int | None) -> str:
        """Why all layers are dense at `step` of `steps` (None, unknown, ignores shares), or "".

        Raises ValueError for a warm-up that leaves no other step.
        """
        if steps is not None and isinstance(self.warmup, int) and self.warmup >= steps:
            raise ValueError(
                f"the schedule asks for {self.warmup} dense warm-up steps in a run of {steps}: "
                "nothing would be accelerated; lower warmup or give a share such as 0.15"
            )
        if step < count_steps(self.warmup, steps or 0):
            return "warm-up step"
        if steps is not None and step >= steps - count_steps(self.cooldown, steps):
            return "cool-down step"
        return ""

    def dense_steps(self, steps: int) -> int:
        """How many of `steps` are dense in all layers."""
        return sum(bool(self.dense_at(step, steps)) for step in range(steps))

    def keep_at(self, step: int, steps: int | None, keep: float) -> float:
        """The method's `keep` at a step; shares of an unknown number of steps are ignored."""
        known = [(s, k) for s, k in self.step_keep if steps is not None or isinstance(s, int)]
        starts = sorted((count_steps(start, steps or 0), k) for start, k in known)
        reached = [k for start, k in starts if start <= step]
        return reached[-1] if reached else keep

    def refreshes(self, step: int, steps: int | None, first: int) -> bool:
        """Whether a state is rebuilt at a step, given the first sparse one."""
        if isinstance(self.refresh, tuple):
            known = [x for x in self.refresh if steps is not None or isinstance(x, int)]
            return step == first or step in {count_steps(x, steps or 0) for x in known}
        return step == first or bool(self.refresh and (step - first) % self.refresh == 0)


@dataclass(frozen=True)
class Plan:
    """A schedule bound to a method's keep and a model's number of layers.

    always: the method runs at keep = 1, too, where others leave the call to the user's backend.
    """

    schedule: Schedule
    keep: float
    layers: int
    always: bool = False

    def __post_init__(self) -> None:
        s = self.schedule
        for layer in (*s.dense_layers, *(i for i, _ in (*s.layer_keep, *s.head_keep))):
            if not -self.layers <= layer < self.layers:
                raise ValueError(
                    f"the schedule names layer {layer}, "
                    f"but this model has layers 0 to {self.layers - 1}"
                )

    def action(self, step: int, steps: int | None, layer: int) -> Action:
        """Dense or sparse for `layer` at `step` of `steps`; None steps (unknown) ignores shares."""
        s = self.schedule
        reason = s.dense_at(step, steps)
        if reason:
            return Action(None, reason)
        if layer in self._layers(s.dense_layers):
            return Action(None, "dense layer")
        keep = self._own(layer, s.keep_at(step, steps, self.keep))
        least = min(keep) if isinstance(keep, tuple) else keep
        if least >= 1 and not self.always:
            return Action(None, "keep = 1")
        first = count_steps(s.warmup, steps or 0)
        return Action(keep, refresh=s.refreshes(step, steps, first))

    def _own(self, layer: int, keep: float) -> float | tuple[float, ...]:
        """What stands for the method's `keep` of this step in a layer, or in each of its heads."""
        heads = self.budget(layer)
        if heads is not None:
            return tuple(min(1.0, share * (keep / self.keep)) for share in heads)
        own = {i % self.layers: k for i, k in self.schedule.layer_keep}.get(layer)
        return keep if own is None else own * (keep / self.keep)

    def budget(self, layer: int) -> tuple[float, ...] | None:
        """The keep of each head of a layer, where it has its own."""
        return {i % self.layers: k for i, k in self.schedule.head_keep}.get(layer)

    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that run sparse at the steps that are not dense altogether."""
        s = self.schedule
        keep = {i % self.layers: k for i, k in s.layer_keep}
        keep |= {i % self.layers: min(k) for i, k in s.head_keep}
        less = min((1.0, *(k / self.keep for _, k in s.step_keep)))  # at some step
        dense = self._layers(s.dense_layers)
        most = 2 if self.always else 1
        return tuple(
            i for i in range(self.layers) if less * keep.get(i, self.keep) < most and i not in dense
        )

    def _layers(self, indices: tuple[int, ...]) -> set[int]:
        return {i % self.layers for i in indices}
