"""From jobs to frames: one call of the stock pipeline for one clip, or for several of one shape."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import dit_accel
from dit_accel.batch.jobs import Job
from dit_accel.batch.weights import Weights
from dit_accel.generation.boost import STOCK
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import arguments
from dit_accel.generation.run import ProgressFn, generate
from dit_accel.generation.stock import stock
from dit_accel.pipelines.denoisers import call as call_pipeline
from dit_accel.samplers import sampling

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


KEPT_PROMPTS = 16
REPORTED = ("method", "kept", "fallbacks", "unplanned", "implementations", "state_bytes")


@dataclass(frozen=True)
class Clip:
    """One clip of a call.

    frames: uint8 [T, H, W, 3], or None.
    latents: of the clip, where the call was for it alone.
    seconds: of generation.
    report: JSON-able, what ran.
    error: why there are no frames.
    facts: what its file says of how it was made.
    """

    frames: np.ndarray | None
    latents: torch.Tensor | None
    seconds: float
    report: dict[str, Any]
    error: str | None = None
    facts: dict[str, Any] | None = None

    @property
    def pixels(self) -> np.ndarray:
        """The frames of a clip that has some; RuntimeError with the reason where it has none."""
        if self.frames is None:
            raise RuntimeError(self.error)
        return self.frames


def render(
    weights: Weights,
    defaults: Defaults,
    jobs: Sequence[Job],
    progress: ProgressFn,
    dense: bool = False,
) -> list[Clip]:
    """The clips of jobs that share one shape, in one call. `dense`: without their method, and what
    stands beside it.

    Raises what the pipeline raises; ValueError for a request that it cannot take.
    """
    config = None if dense else jobs[0].config
    boost = STOCK if dense else jobs[0].boost
    weights.fit(boost)
    pipe = weights.pipe
    if config is None:
        with boost.cached(pipe), stock(pipe):
            return _call(pipe, defaults, jobs, progress, {"method": "dense"})
    with boost.cached(pipe), dit_accel.accelerated(pipe, config) as handle:
        clips = _call(pipe, defaults, jobs, progress, {})
        ran = handle.report().to_dict()
    for clip in clips:
        clip.report.update({key: ran[key] for key in REPORTED})
    return clips


def _call(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    jobs: Sequence[Job],
    progress: ProgressFn,
    report: dict[str, object],
) -> list[Clip]:
    if len(jobs) > 1:
        return _together(pipe, defaults, jobs, progress, report)
    result = generate(pipe, defaults, jobs[0].request(), progress)
    report = {**report, "times": asdict(result.times)}
    report |= {"memory": asdict(result.memory)} if str(result.memory) else {}
    return [Clip(result.frames, result.latents, result.times.total, report)]


def _together(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    jobs: Sequence[Job],
    progress: ProgressFn,
    report: dict[str, object],
) -> list[Clip]:
    """Prompts and generators as lists: each clip has the noise that it would have alone."""
    each = [arguments(pipe, defaults, job.request()) for job in jobs]
    kwargs = {**each[0], "prompt": [k["prompt"] for k in each]}
    kwargs["generator"] = [k["generator"] for k in each]
    if isinstance(kwargs.get("negative_prompt"), str):
        kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(jobs)
    progress("together", 0, len(jobs))
    began = time.perf_counter()
    with sampling(pipe, jobs[0].sampler):
        output = call_pipeline(pipe, **kwargs, output_type="np")
    seconds = (time.perf_counter() - began) / len(jobs)
    pixels = output.frames if hasattr(output, "frames") else output.images
    return [
        _clip(np.asarray(p, np.float32), seconds, {**report, "together": len(jobs)}) for p in pixels
    ]


def _clip(pixels: np.ndarray, seconds: float, report: dict[str, object]) -> Clip:
    if not np.isfinite(pixels).all():
        why = "the pipeline gave pixels that are not numbers: try --dtype fp32"
        return Clip(None, None, seconds, report, why)
    frames = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Clip(frames if frames.ndim == 4 else frames[None], None, seconds, report)


@contextmanager
def remembered_prompts(pipe: DiffusionPipeline) -> Iterator[Callable[[], int]]:
    """Within the block the pipeline encodes each prompt once; yields the number of reuses so far.

    The last 16 answers of `pipe.encode_prompt` are kept; calls that are given tensors pass.
    """
    original = getattr(pipe, "encode_prompt", None)
    if original is None or "encode_prompt" in vars(pipe):
        yield lambda: 0
        return
    kept: OrderedDict[str, Any] = OrderedDict()
    reused = 0

    def encode_prompt(*args: object, **kwargs: object) -> object:
        nonlocal reused
        if any(isinstance(x, torch.Tensor) for x in (*args, *kwargs.values())):
            return original(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key in kept:
            kept.move_to_end(key)
            reused += 1
            return kept[key]
        kept[key] = original(*args, **kwargs)
        if len(kept) > KEPT_PROMPTS:
            kept.popitem(last=False)
        return kept[key]

    pipe.encode_prompt = encode_prompt
    try:
        yield lambda: reused
    finally:
        del pipe.encode_prompt
