"""The only file that touches foreign objects: it re-binds processors, hooks forwards, undoes both.

A processor's `__call__` runs as the same code object over a copy of its module's globals in which
the attention function is ours. So the model's own projections, norms, RoPE, LoRA and fused
weights stay what they are, and nothing outside of the patched modules changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dit_accel.parallel import ulysses as parallel
from dit_accel.pipelines.base import Adapter, Geometry, Site, matching
from dit_accel.pruning import step_cache
from dit_accel.pruning.shared import Part
from dit_accel.pruning.span import Span, blocks_class
from dit_accel.runtime import seam
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.rebind import NAMES, give_back, rebound_class, set_processor


@dataclass
class Patch:
    """One transformer's replaced objects. `install` and `remove` are exact inverses.

    transformer, adapter: whose objects, and where they are.
    engine: what serves its attention calls.
    modules: the attention modules.
    first: the number of the first of them in the engine's books.
    span: the token pruning of this transformer, or None.
    undo: what puts everything back, the last change last.
    layers: the seams of the modules.
    """

    transformer: nn.Module
    adapter: Adapter
    engine: Engine
    modules: list[nn.Module]
    first: int = 0
    span: Span | None = None
    undo: list[Callable[[], Any]] = field(default_factory=list)
    layers: list[seam.Layer] = field(default_factory=list)

    def install(self) -> None:
        """Patch everything, or, when something fails, nothing."""
        try:
            for index, module in enumerate(self.modules, self.first):
                self._rebind(index, module)
            for module in self._readers():
                self._rebind(self.first, module, seam.Reader)
            self._hook_forward()
            self._hook_span()  # before the order's hooks: it sees tokens as the blocks have them
            self._hook_order()
            self._follow_context()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put everything back, last change first."""
        while self.undo:
            self.undo.pop()()
        self.layers.clear()

    def _rebind(self, index: int, module: nn.Module, kind_of: type = seam.Layer) -> None:
        old = module.processor
        layer = kind_of(self.engine, index, old, type(old).__call__.__globals__.get(NAMES[0]))
        self.layers.append(layer)
        own = self.adapter.processor if kind_of is seam.Layer else None
        kind = rebound_class(own or type(old))
        # the number stays on the CPU: reading it never waits for a device
        ours = {"_accel_layer": torch.tensor(layer.id)}
        ours["_accel_gated"] = kind_of is seam.Layer and self.engine.config.method.gated
        if isinstance(old, nn.Module):  # swap the class so that its parameters stay registered
            original = type(old)
            old.__class__ = kind
            old.__dict__.update(ours)
            self.undo.append(
                lambda: ([old.__dict__.pop(name) for name in ours], _set_class(old, original))
            )
            return
        new = kind.__new__(kind)
        new.__dict__.update(old.__dict__, **ours)
        layer.processor = new  # set_attention_backend and enable_parallelism write to this one
        set_processor(module, new)
        self.undo.append(lambda: give_back(module, new, old))

    def _readers(self) -> list[nn.Module]:
        """Attention modules beside the accelerated ones that a pruned span's context serves."""
        if self.span is None or self.span.context is None:
            return []
        return list(matching(self.transformer, self.adapter.span.readers).values())

    def _hook_forward(self) -> None:
        signature = inspect.signature(type(self.transformer).forward)

        @torch.compiler.disable
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            bound = signature.bind_partial(module, *args, **kwargs).arguments
            geometry = self.adapter.geometry(module, bound)
            device = next(x.device for x in bound.values() if isinstance(x, torch.Tensor))
            found = (parallel.config_of(layer.processor) for layer in self.layers)
            shared = next((config for config in found if config is not None), None)
            if self.span is not None:
                self._check_prunable(bound, geometry, shared)
                self.span.whole = self.adapter.span.stays_whole(bound)
            carried = self.adapter.leave is not None and shared is None
            self.engine.begin(geometry, device, carried, self.span, bound.get("timestep"))

        @torch.compiler.disable
        def after(module: nn.Module, args: tuple, output: Any) -> None:
            self.engine.end()

        self._keep(self.transformer.register_forward_pre_hook(before, with_kwargs=True))
        self._keep(self.transformer.register_forward_hook(after))

    def _check_prunable(self, args: dict[str, Any], geometry: Geometry, shared: Any) -> None:
        """RuntimeError for a forward whose tokens cannot be pruned."""
        span, refuses, why = self.span, self.adapter.span.refuses, ""
        span.part = Part()
        if shared is not None and shared.context_parallel_config.ring_degree > 1:
            why = parallel.RING
        elif shared is not None:
            span.part = Part(*parallel.place(shared))
            plan = self.transformer._cp_plan
            why = span.part.obstacle(span.prune, span.site, geometry, plan)
        why = why or step_cache.obstacle(self.transformer, span.first, span.last, span.blocks)
        why = why or (refuses(self.transformer, args) if refuses else "")
        if why:
            name = type(self.transformer).__name__
            raise RuntimeError(f"{name} cannot run token pruning: {why}")

    def _hook_span(self) -> None:
        if self.span is None:
            return
        site, span = self.adapter.span, self.span
        lists, first = site.lists(self.transformer), 0
        for name, blocks in zip(site.blocks, lists, strict=True):
            original = type(blocks)
            blocks.__class__ = blocks_class(original)
            blocks.__dict__["_accel_span"] = (span, first, name in site.single)
            self.undo.append(functools.partial(_give_list_back, blocks, original))
            first += len(blocks)
        if "ttv" in span.prune.criterion:
            for block in [block for blocks in lists for block in blocks][: span.first]:
                for name in site.probes:
                    probe = block.get_submodule(name)
                    watch = span.observer.watch_transition
                    self._keep(probe.register_forward_hook(watch, with_kwargs=True))
        if span.prune.criterion in ("velocity", "cfg"):
            leave = self.transformer.get_submodule(site.leave)
            self._keep(leave.register_forward_hook(span.observer.watch_output))

    def _hook_order(self) -> None:
        if self.adapter.leave is None or self.engine.config.order == "raster":
            return
        for site in self.adapter.enter:
            self._site(site, lambda: self.engine.order.index if self.engine.order.carried else None)
        self._site(
            self.adapter.leave,
            lambda: self.engine.order.back if self.engine.order.carried else None,
        )

    def _site(self, site: Site, index: Callable[[], torch.Tensor | None]) -> None:
        @torch.compiler.disable
        def reorder(module: nn.Module, args: tuple, output: Any) -> Any:
            order = index()
            return output if order is None else _gather(output, site, order)

        self._keep(self.transformer.get_submodule(site.module).register_forward_hook(reorder))

    def _follow_context(self) -> None:
        """Read the step and pass that pipelines announce through `cache_context`."""
        if not hasattr(self.transformer, "cache_context"):
            return
        original, clock = self.transformer.cache_context, self.engine.clock

        def cache_context(name: str, **fields: Any) -> Any:
            return _both(clock.context(name, fields), original(name, **fields))

        before = self.transformer.__dict__.get("cache_context")
        self.transformer.cache_context = cache_context
        self.undo.append(lambda: _restore_attribute(self.transformer, "cache_context", before))

    def _keep(self, handle: Any) -> None:
        self.undo.append(handle.remove)


def _gather(output: Any, site: Site, index: torch.Tensor) -> Any:
    """`output` (a tensor or a tuple of them) with the visual rows along the site's dim permuted."""
    if isinstance(output, (tuple, list)):
        return type(output)(_gather(x, site, index) for x in output)
    index = index.to(output.device)
    if site.flat:
        return output.flatten(site.dim).index_select(site.dim, index).view(output.shape)
    n_text = output.shape[site.dim] - index.numel() if site.text else 0
    if n_text:
        index = torch.cat([torch.arange(n_text, device=index.device), index + n_text])
    return output.index_select(site.dim, index)


def _set_class(obj: Any, kind: type) -> None:
    obj.__class__ = kind


def _give_list_back(blocks: nn.ModuleList, original: type) -> None:
    del blocks.__dict__["_accel_span"]
    blocks.__class__ = original


def _restore_attribute(obj: nn.Module, name: str, before: Any) -> None:
    if before is None:
        obj.__dict__.pop(name, None)
    else:
        setattr(obj, name, before)


class _both:
    """Two context managers as one."""

    def __init__(self, *managers: Any) -> None:
        self.managers = managers

    def __enter__(self) -> None:
        for manager in self.managers:
            manager.__enter__()

    def __exit__(self, *error: Any) -> None:
        for manager in reversed(self.managers):
            manager.__exit__(*error)
