"""The public verbs: accelerate, restore, accelerated, graphed, step_cached, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Unpack

import torch
from torch import nn

from dit_accel.config import DEFAULT, AccelConfig, Options, resolve
from dit_accel.forward.clock import Clock, weakly
from dit_accel.methods import Call, Method
from dit_accel.pipelines import registry
from dit_accel.pipelines.base import Adapter
from dit_accel.pipelines.denoisers import Pipe, denoisers, transformers_of
from dit_accel.pruning.config import TokenPruning
from dit_accel.pruning.config import resolve as pruning
from dit_accel.pruning.span import Span
from dit_accel.runtime import first_block, graphs, patch
from dit_accel.runtime.assemble import Assembly, assemble
from dit_accel.runtime.first_block import check_threshold as check_threshold
from dit_accel.runtime.recorder import NotRecorded as NotRecorded
from dit_accel.runtime.report import Report, build
from dit_accel.schedule import Schedule
from dit_accel.table import BlockTable

SPEED = "_dit_accel_speed"  # where a transformer keeps what `at_speed` made of it


_NOTHING = object()


class Speed(Protocol):
    """What `at_speed` returns, as it is kept."""

    def restore(self) -> None:
        """Give the pipeline back exactly as it was."""

    def end(self) -> None:
        """Something else takes the place of the method: undo what stands beside it."""

    def resume(self) -> None:
        """The method is back: what stood beside it, too."""


class Handle:
    """What `accelerate` returns: the way to the report and back to the pipeline as it was."""

    def __init__(self, pipe: Pipe, found: Assembly) -> None:
        self.config = found.engine.config
        self._engine, self._patches, self._stock = found.engine, found.patches, found.stock
        self._pipe = weakly(pipe)

    @property
    def active(self) -> bool:
        """False once restored or replaced by a later `accelerate`."""
        return any(patch.is_installed(entry) for entry in self._patches)

    @property
    def clock(self) -> Clock:
        """Step, guidance pass and token grid of the forward that ran last."""
        return self._engine.clock

    @property
    def spans(self) -> list[Span]:
        """The token pruning of each transformer; empty without any."""
        return self._engine.spans

    def report(self) -> Report:
        """What ran since `accelerate`: print it, or take `.to_dict()`."""
        names = dict.fromkeys(type(entry.transformer).__name__ for entry in self._patches)
        return build(self._engine, ", ".join(names), self._notes())

    def watch(self, hear: Callable[[int, BlockTable], None] | None) -> None:
        """Call `hear` with the number of the layer and the block table of every sparse call from
        now on; None ends it. Layers are numbered as in the report; tables are not to be changed."""
        self._engine.books.watcher = hear

    def forget(self) -> None:
        """Begin the report anew."""
        engine = self._engine
        engine.books.clear()
        for choice in engine.backends.choices.values() if engine.backends is not None else ():
            choice.calls = 0

    def restore(self) -> None:
        """Give the pipeline back exactly as it was. Doing it twice does nothing."""
        for entry in reversed(self._patches):
            if patch.is_installed(entry):
                entry.remove()

    def _notes(self) -> list[str]:
        """What of the pipeline is not accelerated, and why."""
        notes = [f"{name} runs as it is: {why}" for name, why in self._stock.items()]
        if not self.active:
            notes.append("restored: nothing of this runs any more")
        pipe = self._pipe()
        now = [] if pipe is None else transformers_of(pipe)
        for entry in self._patches if now else ():
            if patch.is_installed(entry) and all(t is not entry.transformer for t in now):
                notes.append(f"{entry.name} was replaced since: the new one runs as it is")
        return notes


def accelerate(
    pipe: Pipe,
    method: str | Path | Method | AccelConfig = DEFAULT,
    *,
    schedule: Schedule | None = None,
    prune: TokenPruning | str | None = None,
    order: str | None = None,
    min_tokens: int | None = None,
    strict: bool | None = None,
    dense: str | None = None,
) -> Handle:
    """Make `pipe`'s transformer attend sparsely from its next call on.

    Args:
        pipe: a diffusers pipeline with one or more diffusion transformers, or such a transformer.
        method: name ("topk"), preset ("topk:fast"), preset file (.json), method object or config.
        prune: token pruning, an object or a preset's name ("balanced").
        schedule, order, min_tokens, strict, dense: replace the configuration's, see AccelConfig.

    An accelerated pipeline is re-configured; one at a speed is given this in its place. Raises
    TypeError for an object that is no such pipeline, ValueError for a bad option or an unknown
    model; the pipeline is then as before.
    """
    options = {"schedule": schedule, "order": order, "min_tokens": min_tokens, "strict": strict}
    config = resolve(method, prune=pruning(prune), dense=dense, **options)
    found = assemble(pipe, config, _denoisers(pipe))
    transformers = [entry.transformer for entry in found.patches]
    before = [old for t in transformers if (old := patch.of(t)) is not None]
    for old in before:
        old.remove()
    done: list[patch.Patch] = []
    try:
        for entry in found.patches:
            entry.install()
            done.append(entry)
    except BaseException:
        for entry in reversed(done):
            entry.remove()
        for old in before:
            old.install()
        raise
    if (speed := speed_of(pipe)) is not None:
        speed.end()
    return Handle(pipe, found)


def restore(pipe: Pipe) -> None:
    """Undo `accelerate`, and `at_speed`: the pipeline is bit for bit what it was. Harmless on a
    stock pipeline. Of a copy of a pipeline at a speed a LoRA and eight bits stay."""
    if (speed := speed_of(pipe)) is not None:
        speed.restore()
    for transformer in _denoisers(pipe).values():
        if (entry := patch.of(transformer)) is not None:
            entry.remove()
        copied = vars(transformer).pop(SPEED, _NOTHING) is None
        if copied and (cache := step_cache_of(transformer)) is not None:
            cache.remove()


@contextmanager
def accelerated(
    pipe: Pipe,
    method: str | Path | Method | AccelConfig = DEFAULT,
    **options: Unpack[Options],
) -> Iterator[Handle]:
    """`accelerate` for the length of a with block; takes the same arguments. What the pipeline was
    accelerated by before comes back behind it, unless it was accelerated anew or restored."""
    before = standing(pipe)
    handle = accelerate(pipe, method, **options)
    try:
        yield handle
    finally:
        if handle.active:
            handle.restore()
            before()


def standing(pipe: Pipe) -> Callable[[], None]:
    """What puts back, on a stock pipeline, the acceleration and the speed that it has now."""
    before, speed = [patch.of(t) for t in dict.fromkeys(_denoisers(pipe).values())], speed_of(pipe)

    def put_back() -> None:
        for entry in filter(None, before):
            entry.install()
        if speed is not None:
            speed.resume()

    return put_back


def speed_of(pipe: Pipe) -> Speed | None:
    """What `at_speed` made of a transformer of this pipeline, or None."""
    found = (vars(t).get(SPEED) for t in _denoisers(pipe).values())
    return next(filter(None, found), None)


@contextmanager
def graphed(pipe: Pipe) -> Iterator[None]:
    """The forwards of `pipe`'s transformers as CUDA graphs, for the length of a with block.

    For where Python takes longer to launch kernels than these take: short clips, small models, few
    blocks. The second generation of a kind records, the third replays; see `runtime.graphs.graphed`
    for what is raised, and for what it costs.
    """
    scheduler = getattr(pipe, "scheduler", None)
    with graphs.graphed(list(_denoisers(pipe).values()), scheduler=scheduler):
        yield


@contextmanager
def step_cached(pipe: Pipe, threshold: float, extrapolate: bool = True) -> Iterator[None]:
    """A step cache on `pipe`'s transformers, accelerated or not, for the length of a with block.

    threshold: up to which relative difference of what the first block adds, from what the last
    steps let expect, a step skips the other blocks; 0.05 is cautious. extrapolate: what they add
    goes on as in the last two steps that ran whole, by as much as the first block does (after
    DiCache, arXiv 2508.17356); False is First-Block-Cache, which adds what was added last. See
    `runtime.first_block`. Raises ValueError for a threshold that is not positive, and where a
    transformer cannot have a step cache or has one.
    """
    transformers = list(dict.fromkeys(_denoisers(pipe).values()))
    with first_block.cached(pipe, transformers, threshold, extrapolate):
        yield


def step_cache_of(transformer: nn.Module) -> first_block.FirstBlockCache | None:
    """That of `step_cached`, whose `decision.threshold` may change between forwards, or None."""
    return first_block.of(transformer)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    method: str | Method = "pooled",
    grid: tuple[int, int, int] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """A method's attention in anyone's model.

    q [B, H, Nq, D], k and v [B, H, Nk, D] → [B, H, Nq, D].

    Raises ValueError for a method whose state spans denoising steps: those need `accelerate`.
    """
    method = resolve(method).method
    if method.stateful:
        raise ValueError(
            f"{method.name} carries state from step to step: use accelerate(pipe, {method.name!r})"
        )
    return method(q, k, v, Call(keep=method.keep, scale=scale, grid=grid))


def register_adapter(adapter: Adapter) -> None:
    """Teach `accelerate` a transformer class that it does not know: docs/reference/models.md."""
    registry.register_adapter(adapter)


def _denoisers(pipe: Pipe) -> dict[str, nn.Module]:
    found = denoisers(pipe)
    if not found:
        kind = "a UNet" if hasattr(pipe, "unet") else "no transformer"
        raise TypeError(
            f"accelerate takes a diffusers pipeline with a diffusion transformer; "
            f"{type(pipe).__name__} has {kind}"
        )
    return found
