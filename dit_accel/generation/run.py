"""One generation: check what was asked, call the stock pipeline, time its three phases."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_accel.generation.loading import Defaults
from dit_accel.generation.offload import Memory, Meter
from dit_accel.generation.request import Request, arguments
from dit_accel.pipelines.denoisers import call as call_pipeline
from dit_accel.pipelines.denoisers import transformers_of
from dit_accel.samplers.install import sampling

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


SHORT = 0.05  # seconds of a step
ProgressFn = Callable[[str, int, int | None], None]
StepFn = Callable[[int, torch.Tensor | None], None]


@dataclass(frozen=True)
class Times:
    """Seconds: text encoding, denoising loop, decoding, all of it; and each denoising step.

    `steps` is empty for a pipeline without step callbacks.
    """

    encode: float
    denoise: float
    decode: float
    total: float
    steps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """frames uint8 [T, H, W, 3] (T = 1 for a picture); latents as they left the last step; memory:
    of the GPU, and how long blocks waited for their weights."""

    frames: np.ndarray
    latents: torch.Tensor | None
    times: Times
    memory: Memory


def generate(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    request: Request,
    progress: ProgressFn = lambda phase, done, total: None,
    on_step: StepFn = lambda step, latents: None,
) -> Result:
    """Run a diffusers pipeline as it is (accelerated or not) and say where the time went.

    `progress` is called with ("encode" | "denoise" | "decode", done, total), `on_step` after each
    denoising step with (steps done, latents); the time they take is not counted, and an exception
    they raise ends the run. Raises ValueError before anything runs when the request does not suit
    the pipeline, RuntimeError when the result is not finite.
    """
    kwargs = arguments(pipe, defaults, request)
    meter, watch = Meter(pipe), Watch(pipe, kwargs, progress, on_step)
    watch.progress("encode", 0, None)
    with watch.listening(), sampling(pipe, request.sampler):
        output = call_pipeline(pipe, **kwargs, **watch.callback(), output_type="np")
    times = watch.finish()
    pixels = output.frames if hasattr(output, "frames") else output.images
    pixels = np.asarray(pixels[0], dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise RuntimeError("the pipeline gave pixels that are not numbers: try --dtype fp32")
    frames = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    frames = frames if frames.ndim == 4 else frames[None]
    return Result(frames, watch.latents, times, meter.read(times.denoise))


def warm_up(pipe: DiffusionPipeline, defaults: Defaults, request: Request, steps: int = 1) -> None:
    """A few denoising steps, thrown away: the first call of a process pays for set-up. A sampler
    that has so many steps and no others makes them all."""
    values = arguments(pipe, defaults, request)
    sampler = getattr(getattr(pipe, "scheduler", None), "sampler", None)
    if getattr(sampler, "kind", "") != "dmd":
        values["num_inference_steps"] = steps
    call_pipeline(pipe, **values, output_type="latent")


def rehearse(
    pipe: DiffusionPipeline, defaults: Defaults, request: Request, progress: ProgressFn
) -> None:
    """A run that is to be replayed as CUDA graphs, twice, thrown away: as ever, and recorded."""
    steps = arguments(pipe, defaults, request)["num_inference_steps"]
    for done in range(2):
        progress("warm-up", done, 2)
        warm_up(pipe, defaults, request, steps)


def is_short(steps: Sequence[float]) -> bool:
    """Whether seconds of steps are so few that on a GPU Python's launches may be most of them."""
    return bool(steps) and median(steps) < SHORT


class Watch:
    """Timestamps of one call: first transformer forward, end of each step, end of the call."""

    def __init__(
        self, pipe: DiffusionPipeline, kwargs: dict[str, Any], progress: ProgressFn, on_step: StepFn
    ) -> None:
        self.pipe, self.on_step = pipe, on_step
        self._progress = progress
        self.away, self.visiting = 0.0, False  # seconds spent in the caller's functions
        self.total_steps: int | None = kwargs.get("num_inference_steps")
        self.latents: torch.Tensor | None = None
        self.first: float | None = None
        self.last = 0.0
        self.ends: list[float] = []
        self.decoded = 0
        self.begin = self._now()

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - self.away

    @contextmanager
    def _aside(self) -> Iterator[None]:
        began, self.visiting = self._now(), True
        yield
        self.visiting = False
        self.away += self._now() - began

    def progress(self, phase: str, done: int, total: int | None) -> None:
        with self._aside():
            self._progress(phase, done, total)

    def callback(self) -> dict[str, object]:
        known = inspect.signature(type(self.pipe).__call__).parameters
        return {"callback_on_step_end": self._step_end} if "callback_on_step_end" in known else {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in transformers_of(self.pipe):
                stack.callback(module.register_forward_pre_hook(self._before).remove)
                stack.callback(module.register_forward_hook(self._after).remove)
            decoder = getattr(getattr(self.pipe, "vae", None), "decoder", None)
            if decoder is not None:
                stack.callback(decoder.register_forward_hook(self._piece_decoded).remove)
            yield

    def _before(self, module: torch.nn.Module, inputs: object) -> None:
        if self.first is None:
            self.first = self._now()
            self.progress("denoise", 0, self.total_steps)

    def _after(self, module: torch.nn.Module, inputs: object, output: object) -> None:
        if not self.ends:
            self.last = self._now()

    def _step_end(
        self, pipe: DiffusionPipeline, step: int, t: Any, values: dict[str, Any]
    ) -> dict[str, Any]:
        self.last = self._now()
        self.ends.append(self.last)
        self.latents = values.get("latents")
        self.total_steps = getattr(pipe, "num_timesteps", self.total_steps)
        self.progress("denoise", step + 1, self.total_steps)
        with self._aside():
            self.on_step(step + 1, self.latents)
        if step + 1 == self.total_steps:
            self.progress("decode", 0, self._pieces())
        return {}

    def _pieces(self) -> int | None:
        """Latent frames, which Wan's autoencoder decodes one by one; None when not a video."""
        return (
            self.latents.shape[2] if self.latents is not None and self.latents.ndim == 5 else None
        )

    def _piece_decoded(self, module: torch.nn.Module, inputs: object, output: object) -> None:
        if self.visiting:  # a preview drawn between two steps
            return
        self.decoded += 1
        pieces = self._pieces()
        self.progress("decode", self.decoded, max(pieces, self.decoded) if pieces else None)

    def finish(self) -> Times:
        end = self._now()
        first = self.first if self.first is not None else end
        marks = [first, *self.ends]
        return Times(
            encode=first - self.begin,
            denoise=self.last - first,
            decode=end - self.last,
            total=end - self.begin,
            steps=[b - a for a, b in zip(marks, marks[1:], strict=False)],
        )
