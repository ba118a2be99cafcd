"""Several clips in one call of a stock pipeline, timed, left on the device as 8-bit frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request, arguments
from dit_accel.generation.run import Watch
from dit_accel.pipelines.denoisers import call as call_pipeline

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


Pair = tuple[str, int]  # prompt and seed


@dataclass(frozen=True)
class Clip:
    """frames uint8 [T, H, W, 3]; final latents [1, …] where the pipeline tells them; its share in
    seconds of the denoising loop, and of the whole call (`wall`)."""

    frames: Tensor
    latents: Tensor | None
    seconds: float
    wall: float


def make(pipe: DiffusionPipeline, defaults: Defaults, requests: Sequence[Request]) -> list[Clip]:
    """One call of the pipeline for requests that differ in prompt and seed only.

    Each clip has the noise that it would have alone. Raises RuntimeError for pixels that are not
    finite.
    """
    kwargs = together(pipe, defaults, requests)
    watch = Watch(pipe, kwargs, lambda phase, done, total: None, lambda step, latents: None)
    with watch.listening():
        output = call_pipeline(pipe, **kwargs, **watch.callback(), output_type="pt")
    times = watch.finish()
    pixels = output.frames if hasattr(output, "frames") else output.images[:, None]
    if not bool(pixels.isfinite().all()):
        raise RuntimeError("the pipeline gave pixels that are not numbers: try --dtype fp32")
    frames = (pixels.float().clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2)
    count, latents = len(requests), watch.latents
    each = latents.split(1) if latents is not None and len(latents) == count else [None] * count
    seconds, wall = times.denoise / count, times.total / count
    return [Clip(f, x, seconds, wall) for f, x in zip(frames, each, strict=True)]


def warm(
    pipe: DiffusionPipeline, defaults: Defaults, requests: Sequence[Request], steps: int
) -> None:
    """A few steps of such a call, thrown away."""
    kwargs = together(pipe, defaults, requests)
    call_pipeline(pipe, **{**kwargs, "num_inference_steps": steps}, output_type="latent")


def together(
    pipe: DiffusionPipeline, defaults: Defaults, requests: Sequence[Request]
) -> dict[str, object]:
    """The arguments of one call for all: prompts and generators as lists."""
    each = [arguments(pipe, defaults, request) for request in requests]
    if len(each) == 1:
        return each[0]
    kwargs = {**each[0], **{k: [e[k] for e in each] for k in ("prompt", "generator")}}
    if isinstance(kwargs.get("negative_prompt"), str):
        kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(each)
    return kwargs


def free() -> None:
    """Give cached device memory back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
