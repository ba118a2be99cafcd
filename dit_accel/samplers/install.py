"""A sampler in a pipeline, and out of it again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dit_accel.samplers.grids import Sampler

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def install(pipe: DiffusionPipeline, sampler: Sampler | str) -> Callable[[], None]:
    """Sample with this from the next call on; returns the function that undoes it.

    The pipeline's scheduler is replaced. Its `prepare_latents` is wrapped: the first noise is
    scaled to the grid's first level, where the pipeline does not do so, and later noise comes from
    the same generator, so that a seed gives the same clip. Raises ValueError for a pipeline that is
    not flow-matching.
    """
    from dit_accel.samplers.schedulers import GridScheduler

    sampler = Sampler.named(sampler) if isinstance(sampler, str) else sampler
    before = getattr(pipe, "scheduler", None)
    known = "FlowMatch" in type(before).__name__ or isinstance(before, GridScheduler)
    predicts = getattr(before, "config", {}).get("prediction_type")
    if not known and predicts != "flow_prediction":
        raise ValueError(
            f"a sampler of few steps takes a flow-matching pipeline, and {type(pipe).__name__} has "
            f"{type(before).__name__}: leave the sampler out"
        )
    scheduler = GridScheduler(str(sampler))
    pipe.scheduler = scheduler
    original = getattr(pipe, "prepare_latents", None)
    wrapped = "prepare_latents" not in vars(pipe)
    if original is not None and wrapped:
        pipe.prepare_latents = _following(original, pipe)

    def undo() -> None:
        if pipe.scheduler is scheduler:
            pipe.scheduler = before
        if wrapped:
            vars(pipe).pop("prepare_latents", None)

    return undo


@contextmanager
def sampling(pipe: DiffusionPipeline, sampler: Sampler | str | None) -> Iterator[None]:
    """`install` for the length of a block; None leaves the pipeline's own scheduler."""
    undo = install(pipe, sampler) if sampler is not None else lambda: None
    try:
        yield
    finally:
        undo()


# a pipeline whose prepare_latents names one of these places the noise at the first level itself
_SCALING = {"init_noise_sigma", "scale_noise", "add_noise", "scale_flow_noise"}


def _following(prepare: Callable[..., Any], pipe: DiffusionPipeline) -> Callable[..., Any]:
    from dit_accel.samplers.schedulers import GridScheduler

    signature = inspect.signature(prepare)
    code = getattr(getattr(prepare, "__func__", prepare), "__code__", None)
    scales = not _SCALING.isdisjoint(getattr(code, "co_names", ()))

    def prepare_latents(*args: object, **kwargs: object) -> object:
        scheduler = pipe.scheduler  # the sampler that was installed last
        if not isinstance(scheduler, GridScheduler):
            return prepare(*args, **kwargs)
        scheduler.generator = signature.bind(*args, **kwargs).arguments.get("generator")
        found = prepare(*args, **kwargs)
        if scales or scheduler.init_noise_sigma == 1:
            return found
        if isinstance(found, tuple):
            return (found[0] * scheduler.init_noise_sigma, *found[1:])
        return found * scheduler.init_noise_sigma

    return prepare_latents
