"""What a visitor asks for, and what the page allows: validated before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dit_accel.config import AccelConfig, named
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.inputs import fields
from dit_accel.pruning.config import resolve as pruning
from dit_accel.schedule import Schedule


@dataclass(frozen=True)
class Limits:
    """The most a visitor may ask for.

    prompt: characters.
    side: pixels.
    frames, steps: of a clip.
    queue: visitors who may wait.
    models: folders or ids offered beside the embedded model.
    public: no other model may be typed in.
    """

    prompt: int = 500
    side: int = 1280
    frames: int = 129
    steps: int = 100
    queue: int = 8
    models: tuple[str, ...] = ()
    public: bool = False

    @classmethod
    def for_public(cls, models: tuple[str, ...] = ()) -> Limits:
        """Tighter bounds, and only the operator's models, for a page that strangers can reach."""
        return cls(prompt=200, side=512, frames=49, steps=50, models=models, public=True)


@dataclass(frozen=True)
class Side:
    """One of the two configurations.

    method: "dense", a name or a preset such as "topk:fast".
    keep: share of key blocks kept, None for the method's own.
    warmup: share of dense steps at the start.
    order: token order.
    small: accelerate below the device's crossover too.
    prune: a preset of token pruning.

    Raises ValueError for a bad value.
    """

    method: str = "dense"
    keep: float | None = None
    warmup: float = 0.15
    order: str = "raster"
    small: bool = False
    prune: str | None = None

    def __post_init__(self) -> None:
        fields.check(self)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warm-up is a share of the steps from 0 to 1, not {self.warmup}")
        self.config()

    def config(self) -> AccelConfig | None:
        """What `accelerate` takes; None for the stock pipeline."""
        method, prune = named(self.method), pruning(self.prune)
        if method.name == "dense" and prune is None:
            return None
        if self.keep is not None and method.name != "dense":
            method = replace(method, keep=self.keep)
        schedule = Schedule(warmup=float(self.warmup))
        least = 0 if self.small else None
        return AccelConfig(method, schedule, self.order, min_tokens=least, prune=prune)

    @property
    def label(self) -> str:
        config = self.config()
        if config is None or config.method.name == "dense":
            words = "dense"
        else:
            words = f"{config.method.label}, keep {config.method.keep:g}"
        return words if self.prune is None else f"{words}, prune {self.prune}"


@dataclass(frozen=True)
class Ask:
    """A whole request. None takes the model's default; model None is the embedded one.

    Raises ValueError, in a sentence a visitor understands, for anything outside `limits`.
    """

    prompt: str
    left: Side = Side()
    right: Side = Side("shared")
    model: str | None = None
    seed: int = 0
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    limits: Limits = field(default=Limits(), repr=False)

    def __post_init__(self) -> None:
        limits = self.limits
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("The prompt is empty: say what to show.")
        if len(self.prompt) > limits.prompt:
            raise ValueError(
                f"The prompt has {len(self.prompt)} characters; this page takes {limits.prompt}."
            )
        if limits.public and self.model not in (None, *limits.models):
            raise ValueError("This page is public and runs only the models in its list.")
        for name, low, high in (
            ("seed", 0, 2**63 - 1),
            ("steps", 1, limits.steps),
            ("width", 16, limits.side),
            ("height", 16, limits.side),
            ("frames", 1, limits.frames),
        ):
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name.capitalize()} is a whole number from {low} to {high}.")

    def request(self, defaults: Defaults) -> Request:
        """What `generate` takes. A model whose own defaults exceed the limits is held to them."""
        return Request(
            self.prompt.strip(),
            seed=self.seed,
            steps=self._bounded(self.steps, defaults.num_inference_steps, self.limits.steps),
            height=self._bounded(self.height, defaults.height, self.limits.side),
            width=self._bounded(self.width, defaults.width, self.limits.side),
            frames=self._bounded(self.frames, defaults.num_frames, self.limits.frames),
        )

    @staticmethod
    def _bounded(asked: int | None, default: int | None, most: int) -> int | None:
        if asked is None and default is not None and default > most:
            raise ValueError(f"This model's default of {default} is more than {most}: set it.")
        return asked if asked is not None else default
