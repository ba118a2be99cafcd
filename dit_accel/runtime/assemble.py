"""An engine and its patches for a pipeline; everything that can be refused is refused here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from dit_accel.config import AccelConfig
from dit_accel.forward.clock import Clock
from dit_accel.pipelines import registry
from dit_accel.pipelines.base import Adapter, head_dim
from dit_accel.pruning.span import Span
from dit_accel.runtime import patch
from dit_accel.runtime.books import Books, LayerBook
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.rebind import obstacle
from dit_accel.schedule import Plan

if TYPE_CHECKING:
    from dit_accel.pipelines.denoisers import Pipe


class Assembly(NamedTuple):
    """What is to be installed. stock: name → why of a denoiser that stays as it is."""

    engine: Engine
    patches: list[patch.Patch]
    stock: dict[str, str]


def assemble(pipe: Pipe, config: AccelConfig, models: dict[str, nn.Module]) -> Assembly:
    """Everything that can be refused is refused here, before the pipeline is touched."""
    adapters, stock = _adapters(models)
    found = {name: _attentions(adapter, models[name]) for name, adapter in adapters.items()}
    for modules in found.values():
        config.method.check(head_dim(next(iter(modules.values()))), len(modules))
    plans = [
        Plan(config.schedule, config.method.keep, len(modules), config.method.runs_at_one)
        for modules in found.values()
    ]
    engine = Engine(config, plans, Clock(pipe), Books(config.strict))
    patches = []
    for part, (name, modules) in enumerate(found.items()):
        first, head = len(engine.books.layers), f"{name}." if len(found) > 1 else ""
        engine.books.layers += [LayerBook(head + m, n, part) for n, m in enumerate(modules)]
        span = _span(config, adapters[name], models[name], engine)
        patches.append(
            patch.Patch(
                models[name], adapters[name], engine, list(modules.values()), first, span, name
            )
        )
    return Assembly(engine, patches, stock)


def _adapters(models: dict[str, nn.Module]) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Name → adapter, and name → why there is none; ValueError where none has one."""
    adapters, stock = {}, {}
    for name, model in models.items():
        try:
            adapters[name] = registry.find(model)
        except ValueError as refusal:
            stock[name] = str(refusal)
    if not adapters:
        raise ValueError(next(iter(stock.values())))
    return adapters, stock


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
