"""What is trained: the transformer's weights or adapters, and the method's tensors, as one."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dit_accel import api
from dit_accel.config import AccelConfig
from dit_accel.finetune.config import Settings
from dit_accel.finetune.data import Batch
from dit_accel.methods.base import Call
from dit_accel.methods.learned import Learned
from dit_accel.methods.topk import TopK
from dit_accel.pipelines import registry
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

    from dit_accel.methods import Method


class Student(nn.Module):
    """A transformer and the method's tensors of its sparse layers.

    It is called like the transformer; `accelerate` takes it for a pipeline, one with no scheduler,
    so that every step is as sparse as the first.
    """

    def __init__(self, transformer: ModelMixin, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.transformer: ModelMixin = transformer
        # a parameter's name may hold no dot
        self.learned = nn.ParameterDict({n.replace(".", "-"): x for n, x in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The method's tensors by the names that with_weights takes."""
        return {name.replace("-", "."): x for name, x in self.learned.items()}

    def forward(self, noisy: Tensor, time: Tensor, conditions: dict[str, object]) -> Tensor:
        """Velocity like `noisy`."""
        return self.transformer(
            hidden_states=noisy, timestep=time, **conditions, return_dict=False
        )[0]


class Shape(NamedTuple):
    """What a layer's tensors depend on."""

    heads: int
    head_dim: int
    width: int


@dataclass(frozen=True)
class _Probe(TopK):
    """Top-k that notes the shape of every layer it serves."""

    seen: dict[int, Shape] = field(default_factory=dict)
    widths: dict[int, int] = field(default_factory=dict)

    gated: ClassVar[bool] = True

    def gate(self, hidden: Tensor, place: tuple[int, int], heads: int) -> None:
        self.widths[place[1]] = hidden.shape[-1]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        self.seen[call.layer] = Shape(q.shape[1], q.shape[3], self.widths.get(call.layer, 0))
        return super().__call__(q, k, v, call)


def shapes(transformer: ModelMixin, batch: Batch, settings: Settings) -> dict[int, Shape]:
    """The shape of each layer that runs sparse on this batch, from one forward.

    Raises ValueError, naming the reason, for a model that cannot run sparse on these data.
    """
    method = _Probe(settings.method.keep, settings.method.block_q, settings.method.block_k)
    student = Student(transformer, {})
    try:
        with torch.no_grad(), api.accelerated(student, _training(method, settings)):
            student(batch.noisy.to(transformer.dtype), batch.time, batch.conditions)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the model cannot run sparse on these data: {reason}") from error
    return method.seen


def initial(
    method: Learned, layers: dict[int, Shape], device: torch.device
) -> dict[str, nn.Parameter]:
    """The method's tensors to train, fp32: those of `method.weights`, else fresh ones.

    Raises ValueError for weights of another shape or of layers that the model lacks.
    """
    start = {name: x.float() for name, x in method.tensors().items()}
    fresh = {
        f"layers.{layer}.{part}": x
        for layer, shape in layers.items()
        for part, x in method.fresh_of(layer, *shape).items()
    }
    for name, x in start.items():
        if name not in fresh:
            raise ValueError(f"{method.weights} holds {name}, which this model has no use for")
        if x.shape != fresh[name].shape:
            raise ValueError(
                f"{name} of {method.weights} is {list(x.shape)}, but this model's head_dim makes "
                f"it {list(fresh[name].shape)}"
            )
    return {n: nn.Parameter(start.get(n, x).to(device)) for n, x in fresh.items()}


def build(transformer: ModelMixin, settings: Settings, batch: Batch) -> Student:
    """Freeze the transformer but for what is trained, and give it the method's tensors."""
    layers = shapes(transformer, batch, settings)
    tensors = initial(settings.method, layers, batch.latents.device)
    transformer.requires_grad_(False)
    if settings.train == "full":
        transformer.float().requires_grad_(True)
    elif settings.train == "lora":
        with torch.random.fork_rng():  # where training starts is a matter of the seed, too
            torch.manual_seed(settings.seed)
            add_lora(transformer, settings.rank, settings.adapt)
    if settings.checkpointing:
        transformer.enable_gradient_checkpointing()
    return Student(transformer, tensors)


def add_lora(transformer: ModelMixin, rank: int, adapt: str = "attention") -> None:
    """Adapters, fp32, on every linear layer of the attention modules that run sparse, or of the
    blocks that these stand in (`adapt="blocks"`: cross-attention and feed-forward, too)."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("training a LoRA needs peft: pip install peft") from None
    places = registry.find(transformer).attentions(transformer)
    if adapt == "blocks":  # "blocks.0.attn1" stands in "blocks.0"
        places = {
            block: transformer.get_submodule(block)
            for block in dict.fromkeys(re.sub(r"(\.\d+)\..*", r"\1", name) for name in places)
        }
    targets = [
        f"{name}.{part}" if part else name
        for name, module in places.items()
        for part, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    # the adapter's second matrix starts at zero: the model is the teacher still
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    for p in transformer.parameters():
        if p.requires_grad:
            p.data = p.data.float()


class Teacher:
    """The dense model: the student's own weights where these stay frozen, otherwise a copy.

    substeps, guidance: of a batch that says until which noise level it goes.
    """

    def __init__(
        self, transformer: ModelMixin, train: str, substeps: int = 1, guidance: float = 1.0
    ) -> None:
        copied = train == "full"
        self.model = copy.deepcopy(transformer).requires_grad_(False) if copied else transformer
        self.adapted = train == "lora"
        self.substeps, self.guidance = substeps, guidance

    @torch.no_grad()
    def velocity(self, batch: Batch) -> Tensor:
        """What the student is to give: fp32, like batch.latents."""
        with self.dense():
            if batch.until is not None:
                return self._until(batch, batch.until)
            return self._at(batch.noisy, batch.time, batch.conditions)

    def _until(self, batch: Batch, until: Tensor) -> Tensor:
        """The mean velocity from sigma to `until` on this model's own trajectory, guided: one Euler
        step with it arrives where `substeps` of this model do (progressive distillation, arXiv
        2202.00512; the guidance goes into the student as in arXiv 2210.03142)."""
        begin = x = batch.noisy
        scale = batch.time / batch.sigma
        for i in range(self.substeps):
            now, then = (batch.sigma.lerp(until, n / self.substeps) for n in (i, i + 1))
            v = self._at(x, now * scale, batch.conditions)
            if self.guidance != 1 and batch.negative is not None:
                other = self._at(x, now * scale, batch.negative)
                v = other + self.guidance * (v - other)
            x = x + _like(then - now, x) * v
        return (x - begin) / _like(until - batch.sigma, x)

    def _at(self, x: Tensor, time: Tensor, conditions: dict[str, Any]) -> Tensor:
        return self.model(
            hidden_states=x.to(self.model.dtype), timestep=time, **conditions, return_dict=False
        )[0].float()

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Adapters are off inside this block."""
        if self.adapted:
            self.model.disable_adapters()
        try:
            yield
        finally:
            if self.adapted:
                self.model.enable_adapters()


def _like(level: Tensor, x: Tensor) -> Tensor:
    """[B] as a factor of x."""
    return level.view(-1, *[1] * (x.ndim - 1))


def training_config(student: Student, settings: Settings) -> AccelConfig:
    """Sparse at every step and on any number of tokens; a layer that cannot is an error."""
    return _training(settings.method.with_weights(student.tensors()), settings)


def _training(method: Method, settings: Settings) -> AccelConfig:
    return AccelConfig(method, Schedule(warmup=0), order=settings.order, min_tokens=0, strict=True)


def inference_config(method: Learned, settings: Settings) -> AccelConfig:
    """What a generation with the result runs."""
    schedule = Schedule(warmup=settings.warmup)
    return AccelConfig(method, schedule, order=settings.order, min_tokens=0)
