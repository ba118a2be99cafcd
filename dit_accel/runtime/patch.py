"""The only file that touches foreign objects: it re-binds processors, hooks forwards, undoes both.

A processor's `__call__` runs as the same code object over a copy of its module's globals in which
the attention function is ours. So the model's own projections, norms, RoPE, LoRA and fused
weights stay what they are, and nothing outside of the patched modules changes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.forward.arguments import given
from dit_accel.parallel import context, ulysses
from dit_accel.pipelines import registry
from dit_accel.pipelines.base import Adapter, Geometry, Site, StandIn, matching
from dit_accel.pruning import step_cache
from dit_accel.pruning.lists import give_back, take_over
from dit_accel.pruning.shared import Part
from dit_accel.pruning.span import Span
from dit_accel.runtime import again, rebind, seam, threads
from dit_accel.runtime.contexts import follow, leave
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.norm_rope import NORM_ROPE

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.utils.hooks import RemovableHandle


MARK = "_dit_accel"  # where a transformer keeps its patch


def of(transformer: nn.Module) -> Patch | None:
    """The patch of this transformer. ValueError for a shallow copy, whose layers are another's."""
    found = transformer.__dict__.get(MARK)
    if found is None or found.transformer is transformer:
        return found
    if is_installed(found):
        raise ValueError(
            f"this {type(transformer).__name__} is a shallow copy of an accelerated one and shares "
            "its layers: accelerate or restore that one, or take copy.deepcopy"
        )
    found.forget(transformer)
    return None


def is_installed(found: Patch) -> bool:
    """Is this the patch of its transformer?"""
    return found.transformer.__dict__.get(MARK) is found


@dataclass(eq=False)
class Patch:
    """One transformer's replaced objects. `install` and `remove` are exact inverses.

    All that it leaves on a transformer is an object that copies with it: a copy, deep or pickled,
    has a patch and an engine of its own.

    transformer, adapter: whose objects, and where they are.
    engine: what serves its attention calls.
    modules: the attention modules.
    first: the number of the first of them in the engine's books.
    span: the token pruning of this transformer, or None.
    name: what the pipeline calls the transformer.
    handles: of the hooks.
    unserved: layer → why its processor, exchanged since, cannot be served.
    bound: (module, its processor) as they were bound last; empty where each must be looked at.
    """

    transformer: nn.Module
    adapter: Adapter
    engine: Engine
    modules: list[nn.Module]
    first: int = 0
    span: Span | None = None
    name: str = "transformer"
    handles: list[RemovableHandle] = field(default_factory=list)
    unserved: dict[int, str] = field(default_factory=dict)
    bound: list[tuple[nn.Module, object]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "adapter": None}  # of functions, which are not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, adapter=registry.find(state["transformer"]))

    def install(self) -> None:
        """Patch everything, or, when something fails, nothing."""
        try:
            self.bind()
            self._hook(self.transformer, self.before, pre=True)
            self._hook(self.transformer, self.after)
            self._hook_span()  # before the order's hooks: it sees tokens as the blocks have them
            self._hook_order()
            follow(self.transformer, self.engine.clock)
            self.transformer.__dict__[MARK] = self
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put everything back."""
        self.engine.close()
        self.bound.clear()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.span is not None:
            for blocks in self.span.site.lists(self.transformer):
                give_back(blocks, self.span)
        for module in (*self.modules, *self._readers()):
            rebind.unbind(module)
        # fuse_qkv_projections remembers the processors that were, for unfuse_qkv_projections
        fused = vars(self.transformer).get("original_attn_processors") or {}
        fused.update({name: rebind.original(old) for name, old in fused.items()})
        self.forget(self.transformer)

    def forget(self, transformer: nn.Module) -> None:
        """Take away what a transformer, or a shallow copy of it, itself keeps of this patch."""
        leave(transformer, self.engine.clock)
        vars(transformer).pop(MARK, None)

    def bind(self) -> None:
        """Serve every attention module, also those whose processor was exchanged since."""
        if self.bound and all(module.processor is old for module, old in self.bound):
            return  # as at the last forward
        self.unserved.clear()
        readers, own = self._readers(), self.adapter.stand_in
        if self.adapter.norm_rope and self.engine.config.method.name != "dense":
            own = NORM_ROPE
        for index, module in enumerate(self.modules, self.first):
            self._bind(index, module, seam.Layer, own)
        for module in readers:
            self._bind(self.first, module, seam.Reader)
        bound: list[tuple[nn.Module, object]] = [(m, m.processor) for m in self.modules + readers]
        inside = any(isinstance(processor, nn.Module) for _, processor in bound)
        self.bound = [] if inside else bound  # a module is bound in place: it stays the same object

    def _bind(self, index: int, module: nn.Module, kind: type, own: StandIn | None = None) -> None:
        layer = rebind.layer_of(module.processor)
        if layer is not None and layer.engine is self.engine:
            return
        rebind.unbind(module)
        why = rebind.obstacle(module)
        if why:
            self.unserved[index] = why
        else:
            rebind.bind(module, kind(self.engine, index), own)

    @property
    def layers(self) -> list[seam.Layer]:
        """The layers that its attention modules are served by now."""
        found = (rebind.layer_of(module.processor) for module in self.modules)
        return [layer for layer in found if layer is not None]

    def _readers(self) -> list[nn.Module]:
        """Attention modules beside the accelerated ones that a pruned span's context serves."""
        if self.span is None or self.span.context is None:
            return []
        return list(matching(self.transformer, self.span.site.readers).values())

    @torch.compiler.disable
    def before(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Forward pre-hook of the transformer."""
        threads.enter(self.engine, self.transformer)
        bound = given(module, args, kwargs)
        geometry = self.adapter.geometry(module, bound)
        device = next(x.device for x in bound.values() if isinstance(x, torch.Tensor))
        self.bind()
        found = (context.config_of(layer.processor) for layer in self.layers)
        shared = next((config for config in found if config is not None), None)
        if self.span is not None:
            self._check_prunable(self.span, bound, geometry, shared)
            self.span.whole = self.span.site.stays_whole(bound)
        again.check_transformer(module, self.engine.config)
        carried = self.adapter.leave is not None and shared is None
        timestep = bound.get("timestep")
        self.engine.begin(geometry, device, carried, self.span, timestep, self.transformer)
        for index, why in self.unserved.items():
            self.engine.bypass(index, why)

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Forward hook of the transformer."""
        self.engine.end(output)

    def _check_prunable(
        self, span: Span, args: dict[str, Any], geometry: Geometry, shared: ParallelConfig | None
    ) -> None:
        """RuntimeError for a forward whose tokens cannot be pruned."""
        refuses, why = span.site.refuses, ""
        span.part = Part()
        if shared is not None and context.is_ring(shared):
            why = "its tokens are shared by a ring: set ulysses_degree instead of ring_degree"
        elif shared is not None:
            span.part = Part(*ulysses.place(shared))
            plan = getattr(self.transformer, "_cp_plan", None) or {}
            why = span.part.obstacle(span.prune, span.site, geometry, plan)
        why = why or step_cache.obstacle(self.transformer, span.first, span.last, span.blocks)
        why = why or (refuses(self.transformer, args) if refuses else "")
        if why:
            name = type(self.transformer).__name__
            raise RuntimeError(f"{name} cannot run token pruning: {why}")

    def _hook_span(self) -> None:
        if self.span is None:
            return
        span, site = self.span, self.span.site
        lists, first = site.lists(self.transformer), 0
        for name, blocks in zip(site.blocks, lists, strict=True):
            take_over(blocks, span, first, name in site.single)
            first += len(blocks)
        if "ttv" in span.prune.criterion:
            for block in [block for blocks in lists for block in blocks][: span.first]:
                for name in site.probes:
                    self._hook(block.get_submodule(name), self._watch_transition, True)
        if span.prune.criterion in ("velocity", "cfg"):
            self._hook(self.transformer.get_submodule(site.leave), self._watch_output)

    def _watch_transition(self, *seen: Any) -> None:
        if self.span is not None:
            self.span.observer.watch_transition(*seen)

    def _watch_output(self, *seen: Any) -> None:
        if self.span is not None:
            self.span.observer.watch_output(*seen)

    def _hook_order(self) -> None:
        if self.adapter.leave is None or self.engine.config.order == "raster":
            return
        for site in (*self.adapter.enter, self.adapter.leave):
            back = site is self.adapter.leave
            reorder = functools.partial(_reorder, self.engine, site, back)
            self._hook(self.transformer.get_submodule(site.module), reorder)

    def _hook(
        self,
        module: nn.Module,
        hook: Callable[..., object],
        kwargs: bool = False,
        pre: bool = False,
    ) -> None:
        register = module.register_forward_pre_hook if pre else module.register_forward_hook
        self.handles.append(register(hook, with_kwargs=kwargs or pre))


@torch.compiler.disable
def _reorder(
    engine: Engine,
    site: Site,
    back: bool,
    module: nn.Module,
    args: tuple[object, ...],
    output: object,
) -> object:
    """Forward hook where tokens enter the order, or leave it."""
    order = engine.order
    index = order.back if back else order.index
    return _gather(output, site, index) if order.carried and index is not None else output


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
