"""What a request costs before it runs: tokens, floating-point operations, seconds.

A forward of N tokens takes 2·P·N operations in the layers' P weights and 4·N²·D in each attention
layer of width D. Seconds follow from the speed of this machine's matrix product until a run has
been measured; from then on from that run.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.app.ask import Ask, BadField, Weights
from dit_accel.app.catalog import card
from dit_accel.config import CROSSOVER, AccelConfig
from dit_accel.generation.options import How
from dit_accel.pipelines.denoisers import transformers_of

if TYPE_CHECKING:
    from dit_accel.app.studio import Studio

_SIZE = 768  # rows of the matrices whose product is timed


@dataclass(frozen=True)
class Weight:
    """weights: of one transformer. width: of its attention, summed over layers."""

    weights: float = 1e7
    width: float = 8 * 384

    @classmethod
    def of(cls, pipe: Any) -> Weight:
        """Of a loaded pipeline."""
        model = transformers_of(pipe)[0]
        config = model.config
        layers = getattr(config, "num_layers", 1) + getattr(config, "num_single_layers", 0)
        width = getattr(config, "num_attention_heads", 8) * getattr(
            config, "attention_head_dim", 64
        )
        return cls(sum(p.numel() for p in model.parameters()), layers * width)

    def forward(self, tokens: int, kept: float = 1.0) -> float:
        """Floating-point operations of one forward."""
        return 2 * self.weights * tokens + 4 * kept * self.width * tokens**2


@dataclass(frozen=True)
class Plan:
    """A request in numbers. tokens: visual ones. left, right: seconds of the denoising loops; rest:
    of all that stands beside them. measured: whether this page has run such sides before."""

    tokens: int
    left: float
    right: float
    rest: float
    measured: bool

    @property
    def total(self) -> float:
        """Seconds of the whole pair."""
        return self.left + self.right + self.rest


@dataclass
class Pace:
    """How fast this machine turned out to be.

    rate: floating-point operations a second of a plain matrix product; 0 before it was timed.
    """

    rate: float = 0.0
    _ratios: dict[tuple[Weights, bool], list[float]] = field(default_factory=dict)
    _beside: dict[Weights, float] = field(default_factory=dict)  # seconds a token

    def prime(self, device: torch.device) -> None:
        """Time a matrix product, once."""
        if self.rate:
            return
        a = torch.randn(_SIZE, _SIZE, device=device)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            (a @ a).sum().item()
            times.append(time.perf_counter() - began)
        self.rate = 2 * _SIZE**3 / median(times)

    def plan(self, ask: Ask, step: tuple[int, int], weight: Weight) -> Plan:
        """What a request, its sizes filled in, is expected to take."""
        tokens, sides = tokens_of(ask, step), (ask.left, ask.right)
        left, right = (
            self._calculated(ask, how, tokens, weight) * self._ratio(ask, how) for how in sides
        )
        beside = self._beside.get(ask.weights)
        rest = 0.5 * left if beside is None else 2 * beside * tokens
        known = all(self._key(ask, how) in self._ratios for how in sides)
        return Plan(tokens, left, right, rest, known)

    def learn(
        self, ask: Ask, how: How, step: tuple[int, int], weight: Weight, took: tuple[float, float]
    ) -> None:
        """A side took so many seconds in its loop, and beside it."""
        tokens = tokens_of(ask, step)
        found = self._ratios.setdefault(self._key(ask, how), [])
        found.append(took[0] / max(self._calculated(ask, how, tokens, weight), 1e-9))
        del found[:-5]
        self._beside[ask.weights] = took[1] / max(tokens, 1)

    def _calculated(self, ask: Ask, how: How, tokens: int, weight: Weight) -> float:
        passes = 2 if (ask.what.guidance or 0) > 1 else 1
        operations = (
            (ask.what.steps or 50) * passes * weight.forward(tokens, kept_share(ask.config(how)))
        )
        return operations / (self.rate or 1e11)

    @staticmethod
    def _key(ask: Ask, how: How) -> tuple[Weights, bool]:
        return ask.weights, ask.config(how) is None

    def _ratio(self, ask: Ask, how: How) -> float:
        """Measured seconds over calculated ones: twice as many, before anything was measured."""
        known = self._ratios.get(self._key(ask, how))
        return median(known) if known else 2.0


def tokens_of(ask: Ask, step: tuple[int, int]) -> int:
    """Visual tokens of a request whose sizes are filled in."""
    width, height = ask.size
    if not width or not height:
        return 0
    frames = 1 + (ask.what.frames or 1) // step[1] if (ask.what.frames or 1) > 1 else 1
    return frames * math.ceil(width / step[0]) * math.ceil(height / step[0])


def check_work(ask: Ask, tokens: int) -> None:
    """BadField where tokens times steps are more than the page allows."""
    steps, most = ask.what.steps or 50, ask.limits.work
    if tokens * steps > most:
        fits = max(1, most // max(tokens, 1))
        way = f"at most {fits} steps" if fits > 3 else "a smaller size or fewer frames"
        raise BadField(
            "steps" if fits > 3 else "size",
            f"This clip is {tokens:,} tokens × {steps} steps = {tokens * steps:,}; this page takes "
            f"{most:,}: choose {way}.",
        )


def kept_share(config: AccelConfig | None) -> float:
    """Share of the attention work that a configuration is expected to do."""
    if config is None:
        return 1.0
    warm = config.schedule.warmup
    share = warm if isinstance(warm, float) else 0.15
    keep = config.method.keep
    return share + (1 - share) * keep


def told(studio: Studio, ask: Ask) -> dict[str, Any]:
    """What the page says beside its button. Raises BadField for what it does not take.

    refused: why the model cannot make this prompt. notes: what to know before.
    """
    full = studio.filled(ask)
    plan = studio.plan(full)
    words = card(ask.model).words
    trouble = words.trouble(ask.what.prompt) if words else None
    scenes = bool(words and words.scenes)
    cpu = studio.where.type == "cpu"
    where = "on this CPU" if cpu else "on this machine"
    size = f"{plan.tokens:,} tokens × {full.what.steps or '?'} steps"
    guess = "" if plan.measured else ", a first guess"
    text = f"{size}: about {duration(plan.total)} {where}{guess}"
    if ask.checkpoint and full.trained is None:
        text = "How long it takes shows once the checkpoint is loaded"
    elif not plan.tokens:
        text = "How long it takes shows once the model is loaded"
    notes = [] if scenes or not trouble else [trouble]
    return {
        "text": text,
        "seconds": plan.total,
        "refused": trouble if scenes and trouble else "",
        "notes": notes,
        "short": too_short(full, plan.tokens, studio.where.type),
    }


def too_short(ask: Ask, tokens: int, device: str) -> str:
    """Why the right side will skip nothing, or ""."""
    config = ask.config(ask.right)
    if config is None or config.method.name == "dense" or not tokens:
        return ""
    least = CROSSOVER.get(device, 0) if config.min_tokens is None else config.min_tokens
    if tokens >= least:
        return ""
    return (
        f"Nothing will be skipped on the right: {tokens:,} tokens are fewer than {least:,}, below "
        "which dense attention is the faster one here."
    )


def duration(seconds: float) -> str:
    """ "5 s", "1 min 40 s", "2 h 10 min"."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 3600:
        whole = round(seconds / 10) * 10
        rest = f" {whole % 60} s" if whole % 60 else ""
        return f"{whole // 60} min{rest}"
    return f"{int(seconds // 3600)} h {round(seconds % 3600 / 60)} min"
