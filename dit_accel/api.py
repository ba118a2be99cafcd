"""The public verbs: accelerate, restore, accelerated, attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.config import DEFAULT, AccelConfig, resolve
from dit_accel.forward.clock import Clock
from dit_accel.methods import Call, Method
from dit_accel.pipelines import registry
from dit_accel.pipelines.base import Adapter
from dit_accel.pipelines.registry import transformers_of
from dit_accel.pruning.config import TokenPruning
from dit_accel.pruning.config import resolve as pruning
from dit_accel.pruning.span import Span
from dit_accel.runtime import patch
from dit_accel.runtime.assemble import assemble
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.report import Report, build
from dit_accel.schedule import Schedule


class Handle:
    """What `accelerate` returns: the way to the report and back to the pipeline as it was."""

    def __init__(self, engine: Engine, patches: list[patch.Patch]) -> None:
        self.config = engine.config
        self._engine = engine
        self._patches = patches

    @property
    def active(self) -> bool:
        """False once restored or replaced by a later `accelerate`."""
        return any(_holder(entry.transformer) is self for entry in self._patches)

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
        return build(self._engine, type(self._patches[0].transformer).__name__)

    def restore(self) -> None:
        """Give the pipeline back exactly as it was. Doing it twice does nothing."""
        for entry in reversed(self._patches):
            entry.remove()
            if _holder(entry.transformer) is self:
                del entry.transformer.__dict__["_dit_accel"]

    def _install(self) -> None:
        try:
            for entry in self._patches:
                entry.install()
                entry.transformer.__dict__["_dit_accel"] = self
        except BaseException:
            self.restore()
            raise


def accelerate(
    pipe: Any,
    method: str | Path | Method | AccelConfig = DEFAULT,
    *,
    schedule: Schedule | None = None,
    prune: TokenPruning | str | None = None,
    order: str | None = None,
    min_tokens: int | None = None,
    strict: bool | None = None,
) -> Handle:
    """Make `pipe`'s transformer attend sparsely from its next call on.

    Args:
        pipe: a diffusers pipeline with a `transformer` (and perhaps a `transformer_2`).
        method: name ("topk"), preset ("topk:fast"), preset file (.json), method object or config.
        prune: token pruning, an object or a preset's name ("balanced").
        schedule, order, min_tokens, strict: replace the configuration's, see AccelConfig.

    An accelerated pipeline is re-configured. Raises TypeError for an object that is no such
    pipeline, ValueError for a bad option or an unknown model; the pipeline is then as before.
    """
    options = {"schedule": schedule, "order": order, "min_tokens": min_tokens, "strict": strict}
    config = resolve(method, prune=pruning(prune), **options)
    transformers = _transformers(pipe)
    engine, patches = assemble(pipe, config, transformers)
    handle = Handle(engine, patches)
    before = {id(h): h for t in transformers if (h := _holder(t))}.values()
    for old in before:
        old.restore()
    try:
        handle._install()
    except BaseException:
        for old in before:
            old._install()
        raise
    return handle


def restore(pipe: Any) -> None:
    """Undo `accelerate`: the pipeline is bit for bit what it was. Harmless on a stock pipeline."""
    for transformer in _transformers(pipe):
        handle = _holder(transformer)
        if handle is not None:
            handle.restore()


@contextmanager
def accelerated(
    pipe: Any, method: str | Path | Method | AccelConfig = DEFAULT, **options: Any
) -> Iterator[Handle]:
    """`accelerate` for the length of a with block; takes the same arguments."""
    handle = accelerate(pipe, method, **options)
    try:
        yield handle
    finally:
        handle.restore()


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


def _holder(transformer: nn.Module) -> Handle | None:
    """The handle that accelerates this transformer now."""
    return transformer.__dict__.get("_dit_accel")


def _transformers(pipe: Any) -> list[nn.Module]:
    found = transformers_of(pipe)
    if not found:
        kind = "a UNet" if hasattr(pipe, "unet") else "no transformer"
        raise TypeError(
            f"accelerate takes a diffusers pipeline with a diffusion transformer; "
            f"{type(pipe).__name__} has {kind}"
        )
    return found
