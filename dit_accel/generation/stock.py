"""A pipeline as it is, for the dense side of whatever is held against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dit_accel.api import accelerated, restore
from dit_accel.parallel.context import config_of, is_ring
from dit_accel.pipelines.denoisers import transformers_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@contextmanager
def stock(pipe: DiffusionPipeline) -> Iterator[None]:
    """The pipeline without acceleration, for the length of a block.

    Where processes share its queries (`share(pipe, kv=…)`) its dense attention is ours, by the same
    backend, in place of diffusers' ring, which few backends serve.
    """
    restore(pipe)
    if not queries_shared(pipe):
        yield
        return
    with accelerated(pipe, "dense"):
        yield


def queries_shared(pipe: DiffusionPipeline) -> bool:
    """Whether each process has some queries of every head."""
    modules = (module for model in transformers_of(pipe) for module in model.modules())
    configs = (config_of(getattr(module, "processor", None)) for module in modules)
    return any(config is not None and is_ring(config) for config in configs)
