"""Whether diffusers' First-Block-Cache can serve a pipeline, said before anything is patched."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

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
    if streams and streams[0] != streams[-1]:
        return f"diffusers' First-Block-Cache cannot join the two kinds of blocks of {kind}"
    if not _tells_passes(type(pipe)):
        return (
            f"{type(pipe).__name__} does not tell the passes of a step apart in diffusers (by a "
            "cache_context), as First-Block-Cache needs"
        )
    return ""


def _blocks(transformer: nn.Module) -> Iterator[nn.Module]:
    """Those that the cache hooks."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
    from diffusers.utils.torch_utils import unwrap_module

    for name, blocks in transformer.named_children():
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(blocks, nn.ModuleList):
            yield from map(unwrap_module, blocks)


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
