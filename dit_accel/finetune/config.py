"""What a fine-tuning run is: validated once, stored in every checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from dit_accel.config import AccelConfig
from dit_accel.forward.order import ORDERS
from dit_accel.generation.limits import check_limits
from dit_accel.inputs import fields
from dit_accel.methods.learned import Learned
from dit_accel.methods.sla import SLA
from dit_accel.samplers.grids import Sampler

TRAIN = ("projection", "lora", "full")
OBJECTIVES = ("teacher", "diffusion")
ADAPTS = ("attention", "blocks")
PRECISIONS = ("no", "bf16", "fp16")
_RATES = {"projection": 0.0, "lora": 1e-4, "full": 1e-5}
# What a resumed run may change: none of it alters the steps that were already made (with a decay,
# `steps` would).
_EVERY = ("save_every", "validate_every", "log_every")
_FREE = ("out", "steps", *_EVERY, "clips", "validation", "warmup", "device")


@dataclass(frozen=True)
class Settings:
    """One fine-tuning run.

    Args:
        out: folder of the result, its checkpoints and its log.
        data: folder of `prepare`, or "self": latents of the model's own samples.
        model: folder or Hugging Face id; None is the embedded model.
        method: a method with tensors (SLA, VSA); its `weights`, if given, are where training
            starts.
        train: "projection" (the method's tensors), "lora" (and adapters), "full" (all weights).
        objective: "teacher" (MSE to the dense model's velocity) or "diffusion" (MSE to noise − x0).
        prompts: text file, one prompt a line, for data="self"; None takes the package's.
        samples: clips that the model makes for data="self".
        size, frames: (width, height) in pixels, frames of a clip; None takes the model's.
        steps, batch, accumulate: optimizer steps; clips in a batch; batches in a step.
        lr, lr_projection: AdamW rates of weights or LoRA (None: 1e-5 or 1e-4) and of projections.
        lr_warmup: steps of linear warm-up.
        lr_decay: share of the steps, at the end, over which the rates fall linearly to zero.
        weight_decay, clip: of AdamW; largest gradient norm.
        ema: decay of the averaged weights that are saved; 0 saves the last ones.
        drop_prompt: share of batches that see the negative prompt; none of a student of few steps.
        rank: of the LoRA.
        adapt: where it is: "attention" (the layers of sparse attention) or "blocks" (every linear
            layer of the blocks that hold one).
        precision: "no", "bf16" or "fp16": accelerate's mixed precision.
        checkpointing: recompute activations in the backward pass, to save memory.
        order: token order, as AccelConfig's.
        device: "cpu"; None takes what accelerate finds.
        warmup: dense share of a validation clip's steps; training itself is sparse at every step.
        seed: of the noise and the batches.
        clips: validation clips, of the first prompts; 0 makes none.
        validation: text file of their prompts; None takes those of `prompts`.
        save_every, validate_every, log_every: steps between checkpoints, validations, log lines.
        few_steps: steps of a run of the student: each learns to arrive where `substeps` guided
            steps of the dense model do (arXiv 2202.00512, 2210.03142), so that it runs without
            guidance; None: the student has as many steps as the model.
        substeps: of the dense model in one of the student's; None: 8.
        shift: of the student's noise levels, as in the sampler "flow:3"; None: 3.
        guidance: of the dense model; None: the model's own.

    Raises ValueError for a value outside its range, and for what goes with another one.
    """

    out: str
    data: str = "self"
    model: str | None = None
    method: Learned = field(default_factory=SLA)
    train: str = "projection"
    objective: str = "teacher"
    prompts: str | None = None
    samples: int = 64
    size: tuple[int, int] | None = None
    frames: int | None = None
    steps: int = 2000
    batch: int = 1
    accumulate: int = 1
    lr: float | None = None
    lr_projection: float = 1e-3
    lr_warmup: int = 100
    lr_decay: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    drop_prompt: float = 0.1
    rank: int = 16
    adapt: str = "attention"
    precision: str = "no"
    checkpointing: bool = False
    order: str = "raster"
    warmup: float = 0.0
    seed: int = 0
    clips: int = 2
    validation: str | None = None
    save_every: int = 500
    validate_every: int = 500
    log_every: int = 10
    device: str | None = None
    few_steps: int | None = None
    substeps: int | None = None
    shift: float | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Learned):
            raise TypeError(
                "finetune trains a method with tensors of its own, an SLA or VSA, not "
                f"{type(self.method).__name__}"
            )
        fields.check(self)
        fields.within("seed", self.seed, 0, 2**63 - 1)
        for name, values in (
            ("train", TRAIN),
            ("objective", OBJECTIVES),
            ("adapt", ADAPTS),
            ("precision", PRECISIONS),
            ("order", ORDERS),
        ):
            if getattr(self, name) not in values:
                given = getattr(self, name)
                raise ValueError(f"{name} is one of {', '.join(values)}, not {given!r}")
        whole = ("samples", "steps", "batch", "accumulate", "rank")
        for name in (*whole, "save_every", "validate_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number ≥ 1, not {getattr(self, name)}")
        for name in ("lr_warmup", "weight_decay", "clips", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is a number ≥ 0, not {getattr(self, name)}")
        for name in ("lr_projection", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is a number > 0, not {getattr(self, name)}")
        for name in ("ema", "drop_prompt", "warmup", "lr_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} lies in [0, 1), not {getattr(self, name)}")
        if self.device not in (None, "cpu"):
            raise ValueError(
                f"device is cpu or left out, not {self.device!r}: CUDA_VISIBLE_DEVICES picks a GPU"
            )
        self._check_few()
        for name in ("rank", "adapt") if self.train != "lora" else ():
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} is of a LoRA, and train is {self.train!r}: leave it out")
        if self.method.keep >= 1:
            raise ValueError("keep = 1 is dense attention: there is nothing to train")
        if not self.method.parts and self.train == "projection":
            raise ValueError(
                "linear=None has no projection to train: take train='full', another linear mode "
                "or a branch"
            )
        rate = _RATES[self.train] if self.lr is None else self.lr
        object.__setattr__(self, "lr", rate)
        if self.train == "projection" and rate:
            raise ValueError(
                "lr is of the model's weights, and train is 'projection', which trains none of "
                "them: lr_projection is of the method's tensors"
            )
        if self.train != "projection" and not rate > 0:
            raise ValueError(f"lr is a number > 0, not {rate}")

    def _check_few(self) -> None:
        """What goes with few steps, and its defaults; ValueError for what does not."""
        if self.few_steps is None:
            for name in ("substeps", "shift", "guidance"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is of a student of few steps: give few_steps, too")
            return
        if self.train == "projection" or self.objective != "teacher":
            raise ValueError(
                "a student of few steps learns the dense model's way in its weights: "
                "train='lora' or 'full', objective='teacher'"
            )
        for name, usual in (("few_steps", 4), ("substeps", 8), ("shift", 3.0)):
            value = usual if getattr(self, name) is None else getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} is a number > 0, not {value}")
            object.__setattr__(self, name, value)
        check_limits({"guidance": self.guidance})
        if self.drop_prompt not in (0.0, type(self).drop_prompt):
            raise ValueError(
                "a student of few steps runs without guidance and sees no negative prompt: leave "
                f"drop_prompt out, not {self.drop_prompt}"
            )
        object.__setattr__(self, "drop_prompt", 0.0)

    @property
    def sampler(self) -> Sampler | None:
        """The grid of a student of few steps."""
        return None if self.few_steps is None else Sampler("flow", shift=self.shift or 3.0)

    @property
    def grid(self) -> tuple[float, ...] | None:
        """Its noise levels, falling to 0."""
        sampler = self.sampler
        return None if sampler is None else (*sampler.sigmas(self.few_steps or 4), 0.0)

    def to_dict(self) -> dict[str, object]:
        """JSON-able form; how blocks are chosen as texts, where it is not the default."""
        found, method = asdict(self), self.method
        found["method"] |= {} if str(method.select) == "means" else {"select": str(method.select)}
        for name in ("drift", "leaders"):  # so do those begun before reuse had these
            if not found["method"]["reuse"][name]:
                found["method"]["reuse"].pop(name)
        if self.adapt == "attention":  # and before there was another place
            found.pop("adapt")
        said = AccelConfig(method).to_dict()["method"]
        for name in method.later:  # runs begun before there was one go on
            found["method"].pop(name)
            found["method"] |= {name: said[name]} if name in said else {}
        return json.loads(json.dumps(found))

    def check_resumes(self, stored: dict[str, object]) -> None:
        """ValueError naming what differs from the run that is to be continued."""
        mine = self.to_dict()
        every = {**mine, **stored}
        bound = [n for n in every if n not in _FREE or (n == "steps" and self.lr_decay)]
        wrong = [f"{n}={stored.get(n)!r}" for n in bound if mine.get(n) != stored.get(n)]
        if wrong:
            raise ValueError(
                f"the run in {self.out} was started with {', '.join(wrong)}: "
                "give the same, or choose another output folder"
            )
