"""Noise levels of few-step sampling: rCM's, those of distribution matching, evenly spaced ones.

No torch here: a grid is a tuple of σ in (0, 1], the last step goes to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import atan, cos, sin
from typing import Any

from dit_accel.inputs import fields

RCM_ANGLES = (1.5, 1.4, 1.0)  # between atan(σ_max) and 0, in TrigFlow's angle
DMD_RUNGS = (1000.0, 757.0, 522.0)  # of FastWan, their shift applied
KINDS = ("rcm", "dmd", "flow", "renoise")
MOST = 1000


@dataclass(frozen=True)
class Sampler:
    """How a run goes from noise to a clip.

    Args:
        kind: "rcm" (arXiv 2510.08431), 1 to 4 steps at the angles atan(σ_max), 1.5, 1.4, 1.0; "dmd"
            (distribution matching, arXiv 2405.14867), the rungs its student was trained on; "flow",
            Euler steps over an even grid, any number of them; "renoise", that grid with fresh noise
            after each step.
        sigma_max: of rCM: 80 for text to video, 200 for image to video.
        rungs: of "dmd": noise levels of 1000, falling.
        shift: σ = shift·u / (1 + (shift − 1)·u) of each level u of "dmd", "flow" and "renoise".

    rCM, "dmd" and "renoise" predict the clip and noise it anew: x ← (1 − σ')(x − σ·v) + σ'·ε.
    Raises ValueError for a value outside its range.
    """

    kind: str
    sigma_max: float = 80.0
    rungs: tuple[float, ...] = DMD_RUNGS
    shift: float = 1.0

    def __post_init__(self) -> None:
        fields.check(self)
        if self.kind not in KINDS:
            raise ValueError(f"a sampler is {', '.join(KINDS)}, not {self.kind!r}")
        if not self.sigma_max > 0:
            raise ValueError(f"sigma_max is a noise level > 0, not {self.sigma_max}")
        if not self.shift > 0:
            raise ValueError(f"shift is a number > 0, not {self.shift}")
        object.__setattr__(self, "rungs", tuple(float(rung) for rung in self.rungs))
        falling = all(a > b for a, b in zip(self.rungs, self.rungs[1:], strict=False))
        if not self.rungs or not falling or not 0 < self.rungs[-1] <= self.rungs[0] <= MOST:
            raise ValueError(f"rungs fall from at most {MOST} to more than 0, unlike {self.rungs}")

    @classmethod
    def named(cls, text: str) -> Sampler:
        """ "rcm", "rcm:200" (σ_max), "dmd:999,749,500,250", "flow:5" and "renoise:5" (shift)."""
        kind, colon, value = text.partition(":")
        given = "sigma_max" if kind == "rcm" else "rungs" if kind == "dmd" else "shift"
        if not colon:
            return cls(kind)
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            raise ValueError(f"the sampler {text!r} is a name, ':' and numbers: flow:5") from None
        if given != "rungs" and len(numbers) > 1:
            raise ValueError(f"the sampler {kind} takes one number, not {value!r}")
        known: dict[str, Any] = {given: numbers if given == "rungs" else numbers[0]}
        return cls(kind, **known)

    def __str__(self) -> str:
        if self.kind == "dmd":
            return "dmd:" + ",".join(f"{rung:g}" for rung in self.rungs)
        return f"{self.kind}:{self.sigma_max if self.kind == 'rcm' else self.shift:g}"

    @property
    def renoises(self) -> bool:
        """Fresh noise follows each prediction."""
        return self.kind != "flow"

    @property
    def distilled(self) -> bool:
        """Only a model distilled for it gives a clip, and it does so without guidance."""
        return self.kind in ("rcm", "dmd")

    @property
    def steps(self) -> int:
        """The usual number of steps."""
        return len(self.rungs) if self.kind == "dmd" else 4

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The noise levels of a run of `steps`, without the last 0; ValueError for a number of
        steps that this sampler does not have."""
        if self.kind == "rcm":
            if not 1 <= steps <= 1 + len(RCM_ANGLES):
                raise ValueError(f"rcm makes 1 to {1 + len(RCM_ANGLES)} steps, not {steps}")
            angles = (atan(self.sigma_max), *RCM_ANGLES[: steps - 1])
            return tuple(sin(t) / (cos(t) + sin(t)) for t in angles)
        if self.kind == "dmd":
            if steps != len(self.rungs):
                raise ValueError(
                    f"{self} makes {len(self.rungs)} steps, those it was trained on, not {steps}"
                )
            return tuple(self._shifted(rung / MOST) for rung in self.rungs)
        if steps < 1:
            raise ValueError(f"a run has at least one step, not {steps}")
        return tuple(self._shifted(1 - i / steps) for i in range(steps))

    def _shifted(self, u: float) -> float:
        return self.shift * u / (1 + (self.shift - 1) * u)
