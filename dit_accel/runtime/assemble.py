"""An engine and its patches for a pipeline; everything that can be refused is refused here."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.config import AccelConfig
from dit_accel.forward.clock import Clock
from dit_accel.pipelines import registry
from dit_accel.pipelines.base import Adapter, head_dim
from dit_accel.pruning.span import Span
from dit_accel.runtime import patch
from dit_accel.runtime.books import LayerBook
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.rebind import obstacle
from dit_accel.schedule import Plan


def assemble(
    pipe: Any, config: AccelConfig, transformers: list[nn.Module]
) -> tuple[Engine, list[patch.Patch]]:
    """Everything that can be refused is refused here, before the pipeline is touched."""
    adapters = [registry.find(t) for t in transformers]
    found = [_attentions(a, t) for a, t in zip(adapters, transformers, strict=True)]
    for modules in found:
        config.method.check(head_dim(next(iter(modules.values()))), len(modules))
    plan = Plan(config.schedule, config.method.keep, len(found[0]), config.method.always)
    engine = Engine(config, plan, Clock(pipe))
    patches = []
    given = zip(transformers, adapters, found, strict=True)
    for part, (transformer, adapter, modules) in enumerate(given):
        first = len(engine.books.layers)
        engine.books.layers += [LayerBook(name, n, part) for n, name in enumerate(modules)]
        span = _span(config, adapter, transformer, engine)
        modules = list(modules.values())
        patches.append(patch.Patch(transformer, adapter, engine, modules, first, span))
    return engine, patches


def _span(
    config: AccelConfig, adapter: Adapter, transformer: nn.Module, engine: Engine
) -> Span | None:
    """The token pruning of one transformer, or None; ValueError where it is not known how."""
    if config.prune is None:
        return None
    if adapter.span is None:
        raise ValueError(
            f"{type(transformer).__name__} cannot run token pruning: {adapter.no_span}"
        )
    if config.prune.criterion == "text" and not adapter.span.joint:
        raise ValueError(
            f"{type(transformer).__name__} reads its text apart from the visual tokens, so "
            "criterion='text' has nothing to see; take another criterion"
        )
    blocks = sum(len(found) for found in adapter.span.lists(transformer))
    span = Span(config.prune, adapter.span, engine.clock, blocks)
    engine.spans.append(span)
    return span


def _attentions(adapter: Adapter, transformer: nn.Module) -> dict[str, nn.Module]:
    """The modules to patch; ValueError when there is none or one cannot be patched."""
    found = adapter.attentions(transformer)
    if not found:
        raise ValueError(
            f"{type(transformer).__name__} has no module named like {', '.join(adapter.attention)}"
        )
    for name, module in found.items():
        why = obstacle(module)
        if why:
            raise ValueError(f"{name} cannot be accelerated: {why}")
    return found
