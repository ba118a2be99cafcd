"""The rows of the end-to-end benchmark: what is switched on, on which steps, and what 50 cost.

A row's name is a generation.variant: a base ("stock", "none", or a method and its kept share as in
"pooled@0.1") and what is added to it: "+cudnn" or "+flash" (backend of dense attention),
"+compile", "+prune", "+cache", "+fp8" (how a state is kept), "+int8" (sparse attention in eight
bits), "+quantize-fp8" or "+quantize-int8" (linear layers in eight bits, by torchao), "+nowarmup"
(no dense step, as fine-tuned SLA runs). "none" leaves the attention core out: no
attention method can be faster. "sla" runs its linear branch in every layer, with random
projections: time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel import SLA, Schedule, TokenPruning, accelerated, step_cached
from dit_accel.api import step_cache_of
from dit_accel.config import Options, named
from dit_accel.generation.boost import Boost, compiled_blocks
from dit_accel.generation.quantize import KINDS
from dit_accel.generation.variant import Variant
from dit_accel.methods import Call, Method
from dit_accel.methods.rectified import Rectified
from dit_accel.methods.stateful import Remembering
from dit_accel.methods.topk import TopK
from dit_accel.pipelines import registry
from dit_accel.pipelines.base import head_dim

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from dit_accel.api import Handle


_LINEAR = {f"quantize-{kind}": kind for kind in KINDS}
ADDED = ("cudnn", "flash", "compile", "prune", "cache", "fp8", "int8", "nowarmup", *_LINEAR)
TOGETHER = "pooled@0.1+cudnn+compile+prune+cache"
_METHODS = ("pooled", "topk", "shared", "rectified", "rettention", "sla")
# The most telling first: what a short budget leaves out is at the end.
ROWS = (
    "stock",
    "stock+cudnn",
    "none",
    "pooled@0.1",
    "topk@0.1",
    "pooled@0.1+prune",
    "stock+cache",
    "pooled@0.1+cache",
    "stock+compile",
    "pooled@0.1+compile",
    "pooled@0.1+compile+prune",
    TOGETHER,
    *(f"{name}@0.1" for name in _METHODS[2:]),
    "shared@0.1+fp8",
    "topk@0.1+int8",
    *(f"{name}@{keep}" for keep in (0.05, 0.2) for name in _METHODS),
    *(f"sla@0.05+nowarmup{more}" for more in ("", "+compile", "+compile+prune")),
    "sla@0.05+nowarmup+compile+prune+cache",
    "stock+cudnn+compile",
    "stock+flash",
)
_FIRST = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_OTHERS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@dataclass(frozen=True)
class NoAttention(Method):
    """Each visual query's output is its value: what is left of a step is not attention."""

    keep: float = 1.0

    always: ClassVar[bool] = True
    name: ClassVar[str] = "none"
    description: ClassVar[str] = "no attention at all"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return q


@dataclass(frozen=True)
class Row:
    """One way of running a model. ValueError for a name that is none of those above."""

    name: str
    method: Method | None
    added: frozenset[str]

    @classmethod
    def parse(cls, name: str) -> Row:
        variant = Variant.parse(name, dict.fromkeys(ADDED, False))
        added = variant.parts
        method: Method | None
        if variant.base in ("stock", "none"):
            if not variant.plain:
                raise ValueError(f"row {name!r} chooses blocks: {variant.base} has none to choose")
            method = NoAttention() if variant.base == "none" else None
        else:
            method = variant.of(named(variant.base))
            if isinstance(method, Rectified):  # random scores are flat: a mass would keep more
                method = replace(method, mass=0.0)
        if "nowarmup" in added and method is None:
            raise ValueError(f"row {name!r} leaves the warm-up out: it has no method to start with")
        if "prune" in added and (method is None or method.stateful):
            raise ValueError(f"row {name!r} prunes: that needs a method that remembers nothing")
        if "fp8" in added:
            if not isinstance(method, Remembering):
                raise ValueError(f"row {name!r} keeps its state as fp8: its method has none")
            method = replace(method, residual="fp8")
        if "int8" in added:
            if not isinstance(method, TopK):
                raise ValueError(f"row {name!r} multiplies in eight bits: its method cannot")
            method = replace(method, precision="int8")
        return cls(name, method, frozenset(added))

    @property
    def schedule(self) -> Schedule:
        """Of the whole run."""
        return Schedule(warmup=0) if "nowarmup" in self.added else Schedule()

    @property
    def stock(self) -> str:
        """The row whose dense steps are this one's."""
        return "+".join(
            ("stock", *(x for x in ("cudnn", "flash", "compile", *_LINEAR) if x in self.added))
        )

    def kinds(self) -> tuple[str, ...]:
        """The kinds of steps that it has after the dense ones.

        full: a step in which a method that remembers looks at everything; pruned: part of the
        tokens; skipped: by the step cache; sparse: any other.
        """
        if self.method is None:
            return ("skipped",) if "cache" in self.added else ()
        kinds = ["full", "sparse"] if self.method.stateful else ["sparse"]
        kinds += [
            kind for kind, part in (("pruned", "prune"), ("skipped", "cache")) if part in self.added
        ]
        return tuple(kinds)


@dataclass(frozen=True)
class Course:
    """A short run in which each kind of step comes `rounds` + 1 times; the first is thrown away.

    dense: whether dense steps are run as well; without them they are another row's.
    """

    row: Row
    rounds: int
    dense: bool = True

    @property
    def first(self) -> int:
        """The step from which the method runs."""
        dense = self.dense and "nowarmup" not in self.row.added
        return self.rounds + 1 if dense or self.row.method is None else 0

    @property
    def steps(self) -> int:
        return self.first + (self.rounds + 1) * self._stride

    @property
    def _stride(self) -> int:
        """After how many steps all kinds have come once; the cache skips every second."""
        kinds = self.row.kinds()
        computed = len([kind for kind in kinds if kind != "skipped"])
        return max(1, computed) * 2 if "skipped" in kinds else computed

    def skips(self, step: int) -> bool:
        """Whether the step cache is to skip this step."""
        after = step - self.first
        return "cache" in self.row.added and after > 0 and after % 2 == 1

    def options(self, transformer: ModelMixin, min_tokens: int | None) -> tuple[Method, Options]:
        """`accelerate`'s arguments for a pipeline of this transformer."""
        row, cached = self.row, "cache" in self.row.added
        assert row.method is not None, "a stock row is not accelerated"
        method = with_projections(row.method, transformer)
        if isinstance(method, Remembering):
            method = replace(method, period=2)
        prune = None
        if "prune" in row.added:
            # with skipped steps between, the last full step is 1, 3 or 2, 4 steps away
            prune = TokenPruning(refresh=3 if cached else 2, start=self.first, end=0)
        schedule = Schedule(warmup=self.first)
        return method, {"schedule": schedule, "prune": prune, "min_tokens": min_tokens}


def whole_run(row: Row, steps: int) -> list[str]:
    """The kind of each of `steps` steps under the default schedules of method and pruning.

    A step cache is taken to skip every second step after the warm-up: which ones it skips depends
    on what the model's weights make of the prompt.
    """
    prune, method = TokenPruning(), row.method
    kinds, full, remembered, first = [], 0, None, None
    for step in range(steps):
        dense = row.schedule.dense_at(step, steps)
        first = step if first is None and not dense else first
        if dense:
            kind = "dense"
        elif "cache" in row.added and first is not None and (step - first) % 2:
            kind = "skipped"
        elif method is None:
            kind = "dense"
        elif isinstance(method, Remembering) and (
            remembered is None or method.due(step, remembered, steps)
        ):
            kind, remembered = "full", step
        elif "prune" in row.added and prune.prunes(step, steps, full):
            kind = "pruned"
        else:
            kind = "sparse"
        if kind not in ("pruned", "skipped"):
            full = step
        kinds.append(kind)
    return kinds


@contextmanager
def switched_on(
    pipe: DiffusionPipeline, course: Course, min_tokens: int | None, compiler: str
) -> Iterator[Handle | None]:
    """The pipeline under this row; gives the handle of `accelerate`, or None. Leaves it as it was.

    compiler: torch.compile's backend.
    """
    row, transformer = course.row, pipe.transformer
    with ExitStack() as stack:
        for name in row.added & _FIRST.keys():
            order = [_FIRST[name], *(b for b in _OTHERS if b != _FIRST[name])]
            stack.enter_context(sdpa_kernel(order, set_priority=True))
        for name in row.added & _LINEAR.keys():
            boost = Boost(quantize=_LINEAR[name])
            boost.check(pipe)
            stack.enter_context(boost.quantized(pipe))
        if "compile" in row.added:
            stack.enter_context(compiled_blocks(transformer, compiler))
        if "cache" in row.added:
            stack.enter_context(step_cached(pipe, 1.0))  # see set_skip
        if row.method is None:
            yield None
        else:
            method, options = course.options(transformer, min_tokens)
            yield stack.enter_context(accelerated(pipe, method, **options))


def with_projections(method: Method, transformer: ModelMixin) -> Method:
    """SLA with a random projection for every layer, always the same; any other method as it is."""
    if not isinstance(method, SLA):
        return method
    layers = registry.find(transformer).attentions(transformer).values()
    sizes = [head_dim(layer) or transformer.config.attention_head_dim for layer in layers]
    where, chance = next(transformer.parameters()).device, torch.Generator().manual_seed(0)
    tensors = [torch.randn(d, d, generator=chance) / d**0.5 for d in sizes]
    return method.with_weights({f"layers.{i}.weight": x.to(where) for i, x in enumerate(tensors)})


def set_skip(transformer: nn.Module, skip: bool) -> None:
    """Make a step cache, if there is one, skip or compute the next step, whatever the first block
    gives."""
    if (cache := step_cache_of(transformer)) is not None:
        cache.decision.threshold = float("inf") if skip else -1.0
