"""Whether diffusers' First-Block-Cache can serve a pipeline, said before anything is patched, and
the names of guidance passes for pipelines that give none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from dit_accel.forward.clock import Clock
from dit_accel.pipelines.base import NOWHERE

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def obstacle(pipe: DiffusionPipeline, transformer: nn.Module) -> str:
    """Why it cannot, or ""."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    kind = type(transformer).__name__
    if not hasattr(transformer, "enable_cache"):
        return f"{kind} has no step caches in diffusers"
    kinds: dict[Any, None] = dict.fromkeys(map(type, _blocks(transformer)))
    streams = []
    for block in kinds:
        name = f"{block.__name__} of {kind}"
        try:
            known = TransformerBlockRegistry.get(block)
            streams.append(known.return_encoder_hidden_states_index is not None)
        except ValueError:
            return f"diffusers' First-Block-Cache does not know {name}"
        if "hidden_states" not in inspect.signature(block.forward).parameters:
            return f"diffusers' First-Block-Cache cannot read {name}: it takes no hidden_states"
    alternate = hasattr(transformer, "temporal_transformer_blocks")
    if alternate or (streams and streams[0] != streams[-1]):
        return f"diffusers' First-Block-Cache cannot join the two kinds of blocks of {kind}"
    return ""


@contextmanager
def passes_told(pipe: DiffusionPipeline, transformer: Any) -> Iterator[None]:
    """A block in which the cache knows a forward's pass by its place in the step, and begins anew
    with each generation, where the pipeline's own code does not say so."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    kind: Any = type(pipe)
    if _tells_passes(kind):
        yield
        return
    clock = Clock(pipe)

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if clock.tick(NOWHERE, kwargs.get("timestep"), module):
            module._reset_stateful_cache()
        _set_cache_context(module, CacheContext(clock.passname))

    hook = transformer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _blocks(transformer: nn.Module) -> Iterator[nn.Module]:
    """Those that the cache hooks."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
    from diffusers.utils.torch_utils import unwrap_module

    for name, blocks in transformer.named_children():
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(blocks, nn.ModuleList):
            yield from map(unwrap_module, blocks)


@cache
def _tells_passes(pipeline: type) -> bool:
    """Whether a pipeline's code, or that of a class that it extends, names a cache context."""
    for own in pipeline.__mro__:
        try:
            source = inspect.getsource(own) if own.__module__ != "builtins" else ""
        except (OSError, TypeError):  # without a file: a run will tell
            return True
        if "cache_context" in source:
            return True
    return False
