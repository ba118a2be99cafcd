"""What a run may be asked for: every option described once, in groups, and what a group becomes.

Command line and page take their options from here. Imports nothing heavy; None leaves the choice to
the model or the method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

if TYPE_CHECKING:
    from dit_accel.config import AccelConfig
    from dit_accel.generation.boost import Boost
    from dit_accel.generation.request import Request


class Option(NamedTuple):
    """What is said of a value that may be given.

    text: a sentence; its default, where it has one of its own, in brackets.
    group: the heading that it stands under.
    given_first: it stands before all others, without a name.
    alone: it may stand without a value, too; of what follows it these words are its values.
    """

    text: str
    group: str
    given_first: bool = False
    alone: tuple[str, ...] = ()


def described(group: object) -> dict[str, Option]:
    """Name → description of the options of a group, or of a function that takes some."""
    hints = get_type_hints(group, include_extras=True)
    return {
        name: note
        for name, hint in hints.items()
        for note in getattr(hint, "__metadata__", ())
        if isinstance(note, Option)
    }


WHAT, HOW, WHERE = "What to make", "How to accelerate", "Where to run"
# What is said of options that a command may also take several times, or under another heading.
NEGATIVE, STEPS, SIZE = "What not to show.", "Denoising steps.", "WIDTHxHEIGHT in pixels."
FRAMES, GUIDANCE = "Frames of the clip.", "Classifier-free guidance scale."
IMAGE = "First picture, for models that need one."
SAMPLER = "Grid of few steps, for models distilled to it: rcm, dmd, flow:5, renoise:5."
METHOD = "Such as shared, topk:fast, pooled/sub@0.1, or a preset file; see `methods`."
PRUNE = "Share of the tokens run in most steps (0.5), or safe, balanced, fast."
STEP_CACHE = "Skip steps that are foreseen but for less than this, such as 0.05."
LORA = "LoRA of a fine-tuned SLA; the dense run goes without."
QUANTIZE = "Linear layers in eight bits: int8 or fp8."
SPEED = "All of it in one word: conservative, balanced or fast, in place of a method."
CHECKPOINT = "Trained weights over the model's: a file, a folder or an id; twice for two experts."
MIN_TOKENS = "Attend densely below this many tokens."

Prompt = Annotated[str, Option("What to show.", WHAT, given_first=True)]
Negative = Annotated[str | None, Option(NEGATIVE, WHAT)]
Seed = Annotated[int, Option("Same seed, same noise, on any device. [0]", WHAT)]
Steps = Annotated[int | None, Option(STEPS, WHAT)]
Size = Annotated[str | None, Option(SIZE, WHAT)]
Frames = Annotated[int | None, Option(FRAMES, WHAT)]
Fps = Annotated[float | None, Option("Frames a second of the file.", WHAT)]
Guidance = Annotated[float | None, Option(GUIDANCE, WHAT)]
Image = Annotated[Path | None, Option(IMAGE, WHAT)]
Sampler = Annotated[str | None, Option(SAMPLER, WHAT)]

Speed = Annotated[str | None, Option(SPEED, HOW)]
Method = Annotated[str | None, Option(METHOD, HOW)]
Keep = Annotated[float | None, Option("Share of key blocks kept, in (0, 1].", HOW)]
Warmup = Annotated[
    str | None, Option("Dense steps at the start: a share (0.15) or a number (3).", HOW)
]
Select = Annotated[
    str | None, Option("How blocks are chosen: sub, sub(8) or another of `selectors`.", HOW)
]
Reuse = Annotated[
    str | None, Option("Tables that serve more: so many steps (4), passes, or 4+passes.", HOW)
]
Sort = Annotated[
    str | None, Option("Order of each head: time, tile, clusters, per-head(profile.json).", HOW)
]
StepKeep = Annotated[
    str | None, Option("Keep from a share or number of steps on: 0.15:0.5,0.4:0.1.", HOW)
]
Refresh = Annotated[
    str | None, Option("Full steps of a method with a state: every 5, or at 0.2,0.3,0.5.", HOW)
]
Heads = Annotated[
    str | None, Option("Keep of each head by a file of `profile`: profile.json@0.1.", HOW)
]
Prune = Annotated[str | None, Option(PRUNE, HOW)]
Compile = Annotated[bool, Option("Compile the blocks; worth a minute on a GPU.", HOW)]
StepCache = Annotated[float | None, Option(STEP_CACHE, HOW)]
Lora = Annotated[str | None, Option(LORA, HOW)]
Quantize = Annotated[str | None, Option(QUANTIZE, HOW)]
Dense = Annotated[
    str | None,
    Option("Dense attention by auto, the fastest exact backend, or by name. [the model's]", HOW),
]
Order = Annotated[str | None, Option("Token order: raster, tile, hilbert or time.", HOW)]
MinTokens = Annotated[int | None, Option(MIN_TOKENS, HOW)]

Model = Annotated[
    str | None, Option("Folder or Hugging Face id. [the embedded emoji model]", WHERE)
]
Checkpoint = Annotated[list[str] | None, Option(CHECKPOINT, WHERE)]
Device = Annotated[str | None, Option("cpu, cuda, cuda:1, mps. [a GPU if any]", WHERE)]
Dtype = Annotated[str | None, Option("bf16, fp16, fp32. [bf16 on CUDA, else fp32]", WHERE)]
Offload = Annotated[
    bool | str,
    Option(
        "Keep only the running part on the GPU; blocks or blocks:4: of it only so many blocks.",
        WHERE,
        alone=("model", "blocks"),
    ),
]
Ulysses = Annotated[int, Option("GPUs (or CPU processes) that share one generation. [1]", WHERE)]
Kv = Annotated[
    str | None,
    Option("They share queries, not heads; keys come to each by gather or by ring.", WHERE),
]


@dataclass(frozen=True)
class What:
    """What to make."""

    prompt: Prompt
    negative: Negative = None
    seed: Seed = 0
    steps: Steps = None
    size: Size = None
    frames: Frames = None
    fps: Fps = None
    guidance: Guidance = None
    sampler: Sampler = None
    image: Image = None

    def request(self) -> Request:
        """The generation asked for; ValueError for an impossible value."""
        from dit_accel.generation.limits import check_limits
        from dit_accel.generation.request import Request
        from dit_accel.media.pictures import read_picture

        width, height = parse_size(self.size) if self.size is not None else (None, None)
        check_limits({"fps": self.fps})
        return Request(
            prompt=self.prompt,
            negative_prompt=self.negative,
            seed=self.seed,
            steps=self.steps,
            height=height,
            width=width,
            frames=self.frames,
            guidance=self.guidance,
            sampler=self.sampler,
            image=None if self.image is None else read_picture(self.image),
        )


@dataclass(frozen=True)
class How:
    """How to accelerate."""

    method: Method = None
    keep: Keep = None
    warmup: Warmup = None
    select: Select = None
    reuse: Reuse = None
    sort: Sort = None
    step_keep: StepKeep = None
    refresh: Refresh = None
    heads: Heads = None
    prune: Prune = None
    compile: Compile = False
    step_cache: StepCache = None
    lora: Lora = None
    order: Order = None
    min_tokens: MinTokens = None
    dense: Dense = None
    quantize: Quantize = None
    speed: Speed = None

    def at_speed(self) -> How:
        """With the options of the profile, where it is asked for, but those that are given.

        ValueError for an unknown profile, and for a method beside it.
        """
        if self.speed is None:
            return self
        from dit_accel.generation.speeds import options

        if self.method is not None:
            raise ValueError(
                f"speed {self.speed!r} has a method of its own: leave out {self.method!r} or speed"
            )
        own = {k: v for k, v in options(self.speed).items() if getattr(self, k) is None}
        return replace(self, speed=None, **own)

    def config(self, trained: AccelConfig | None = None) -> AccelConfig:
        """The acceleration asked for; ValueError for an unknown method or a bad option.

        trained: what a checkpoint was trained for, taken where no other method is asked for.
        """
        from dit_accel.config import DEFAULT, resolve
        from dit_accel.pruning.config import resolve as pruning

        if self.speed is not None:
            return self.at_speed().config(trained)
        # pruned tokens and a state of all tokens exclude each other
        default = DEFAULT if self.prune is None else "pooled"
        config = resolve(
            self._base(trained) or self.method or default,
            order=self.order,
            min_tokens=self.min_tokens,
            prune=pruning(self.prune),
            dense=self.dense,
        )
        names = ("keep", "select", "reuse", "sort")
        asked = {name: getattr(self, name) for name in names}
        own: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        if own:
            config = replace(config, method=config.method.replaced(**own))
        return self._scheduled(config)

    def _base(self, trained: AccelConfig | None) -> AccelConfig | None:
        """The trained configuration, where it is not replaced: its method by name means it, too,
        for the name alone would run it without what it has learned."""
        if trained is None or self.method is None or self.method.endswith(".json"):
            return trained if self.method is None else None
        from dit_accel.config import named

        asked = named(self.method)
        if type(asked) is not type(trained.method):
            return None
        told: dict[str, Any] = {"keep": asked.keep} if {":", "@"} & set(self.method) else {}
        told |= {"select": asked.select} if "/" in self.method else {}
        return replace(trained, method=trained.method.replaced(**told))

    def _scheduled(self, config: AccelConfig) -> AccelConfig:
        """With what the options say of steps and heads."""
        given = {"warmup": self.warmup, "step_keep": self.step_keep, "refresh": self.refresh}
        read = {"warmup": parse_warmup, "step_keep": parse_step_keep, "refresh": parse_refresh}
        if self.refresh is not None and not config.method.stateful:
            raise ValueError(
                f"refresh is for methods that keep a state, and {config.method.name} keeps none: "
                "leave it out"
            )
        if self.heads is not None and self.keep is not None:
            raise ValueError("heads names a keep of its own (profile.json@0.1): leave keep out")
        changed: dict[str, Any] = {
            name: read[name](text) for name, text in given.items() if text is not None
        }
        if self.heads is not None:
            from dit_accel.methods.budget import head_keep

            keep, changed["head_keep"] = head_keep(self.heads, config.method)
            config = replace(config, method=config.method.replaced(keep=keep))
        return replace(config, schedule=replace(config.schedule, **changed)) if changed else config

    def boost(self) -> Boost:
        """What runs beside the method; ValueError for a bad value."""
        from dit_accel.generation.boost import Boost

        how = self.at_speed()
        return Boost(how.compile, how.step_cache, how.lora, how.quantize)


@dataclass(frozen=True)
class Where:
    """Where to run."""

    model: Model = None
    checkpoint: Checkpoint = None
    device: Device = None
    dtype: Dtype = None
    offload: Offload = False


@dataclass(frozen=True)
class Clips:
    """The clips that a study makes of many prompts, and what all its configurations share."""

    steps: Steps = None
    size: Size = None
    frames: Frames = None
    guidance: Guidance = None
    order: Order = None
    min_tokens: MinTokens = None

    def of(self, prompt: str) -> What:
        """The clip of one prompt."""
        return What(
            prompt, steps=self.steps, size=self.size, frames=self.frames, guidance=self.guidance
        )

    def how(self, warmup: str | None = None) -> How:
        """What configurations start from."""
        return How(warmup=warmup, order=self.order, min_tokens=self.min_tokens)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "832x480"; ValueError for anything else."""
    width, cross, height = text.lower().replace("×", "x").partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size is WIDTHxHEIGHT such as 832x480, not {text!r}")
    return int(width), int(height)


def parse_warmup(text: str) -> float | int:
    """A number of steps ("3") or a share of them ("0.15")."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(
            f"warmup is a share (0.15) or a number of steps (3), not {text!r}"
        ) from None


def parse_step_keep(text: str) -> tuple[tuple[float | int, float], ...]:
    """Pairs (start, keep) of "0.15:0.5,10:0.1"."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((parse_warmup(start), float(keep)) for start, keep in pairs)
    except ValueError:
        raise ValueError(f"step-keep is start:keep pairs such as 0.15:0.5, not {text!r}") from None


def parse_refresh(text: str) -> int | tuple[float | int, ...]:
    """A period ("5") or the steps of full ones ("0.2,0.3", "5,")."""
    if text.isdecimal():
        return int(text)
    return tuple(parse_warmup(part.strip()) for part in text.split(",") if part.strip())
