"""A transformer and the arguments of one of its forwards, at a size that can be timed quickly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.doctor.from_config import Shell, Size, family_of, latent_size, skeleton
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request, arguments, granularity
from dit_accel.pipelines import registry
from dit_accel.pipelines.denoisers import call as call_pipeline
from dit_accel.pipelines.denoisers import transformers_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


# Tokens that a processor is timed on at most; a GPU runs what is asked.
MOST = {"cpu": 2048}


class Enough(Exception):
    """Raised inside a forward once what was looked for has come by."""


@dataclass
class Sample:
    """What `doctor` examines: a pipeline and one forward of its transformer.

    pipe: whose transformer it is.
    args, kwargs: of the forward.
    scale: asked tokens over those of these arguments.
    counts: layers of each kind of block; None counts them in the model.
    passes: forwards in a denoising step.
    """

    pipe: DiffusionPipeline | Shell
    args: tuple
    kwargs: dict[str, Any]
    scale: float = 1.0
    counts: list[int] | None = None
    passes: int = 1

    @property
    def transformer(self) -> nn.Module:
        return transformers_of(self.pipe)[0]

    @property
    def device(self) -> torch.device:
        return next(x.device for x in (*self.args, *self.kwargs.values()) if torch.is_tensor(x))

    def kinds(self) -> dict[str, int]:
        """Name of the first block of each kind → how many blocks of that kind the model has."""
        adapter = registry.find(self.transformer)
        blocks: dict[type, list[str]] = {}
        for name in adapter.attentions(self.transformer):
            block = name.rpartition(".")[0]
            blocks.setdefault(type(self.transformer.get_submodule(block)), []).append(block)
        if not blocks:
            raise ValueError(f"{type(self.transformer).__name__} has no attention to accelerate")
        counts = self.counts or [len(names) for names in blocks.values()]
        return {names[0]: n for names, n in zip(blocks.values(), counts, strict=True)}

    def scaled(self, whole: float, hollow: float) -> tuple[float, float]:
        """Seconds of a block, and without its attention core, at the asked number of tokens."""
        rest = min(whole, hollow) * self.scale
        return rest + max(0.0, whole - hollow) * self.scale**2, rest


def from_pipeline(pipe: DiffusionPipeline, defaults: Defaults, request: Request) -> Sample:
    """The first transformer forward of this request, smaller where a processor would be slow.

    Raises ValueError for a model without adapter and for a request that does not suit it.
    """
    transformer = transformers_of(pipe)[0]
    registry.find(transformer)
    values = arguments(pipe, defaults, request)
    frames, height, width = (values.get(name) for name in ("num_frames", "height", "width"))
    side, stride = granularity(pipe)
    scale = 1.0
    if height is not None and width is not None:
        asked = (frames or 1, height, width)
        small = _shrunk(asked, side, stride, MOST.get(pipe._execution_device.type))
        scale = _tokens(asked, side, stride) / _tokens(small, side, stride)
        request = replace(request, height=small[1], width=small[2])
        request = request if frames is None else replace(request, frames=small[0])
    values = {**arguments(pipe, defaults, request), "output_type": "latent"}
    args, kwargs = caught(transformer, lambda: call_pipeline(pipe, **values))
    guided = values.get("guidance_scale", 0) > 1 and not getattr(
        transformer.config, "guidance_embeds", False
    )
    one = next(x.shape[0] for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.ndim) == 1
    return Sample(pipe, args, kwargs, scale, passes=2 if guided and one else 1)


def from_config(
    config: dict[str, Any], size: Size | None, device: torch.device, dtype: torch.dtype
) -> Sample:
    """A model of which only the transformer's configuration is known; see from_config.py.

    size: (frames, height, width) pixels, or the family's usual one.
    """
    asked = size or family_of(config["_class_name"]).size
    unit = _unit(config)
    small = _shrunk(asked, *unit, MOST.get(device.type))
    built = skeleton(config, small, device, dtype)
    scale = _tokens(asked, *unit) / _tokens(small, *unit)
    return Sample(built.pipe, (), built.arguments, scale, built.counts, built.passes)


def caught(transformer: nn.Module, run: Callable[[], object]) -> tuple[tuple, dict[str, object]]:
    """The arguments of the first transformer forward of `run`, which then ends."""
    found: list[tuple[tuple, dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise Enough

    hook = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run()
    except Enough:
        return found[0]
    finally:
        hook.remove()
    raise ValueError(f"{type(transformer).__name__} was not called by its pipeline")


def _unit(config: dict[str, Any]) -> tuple[int, int]:
    """(pixels of a token's side, frames of a latent) of a configuration."""
    t, h, _ = latent_size(config, (129, 1024, 1024))
    patch = config.get("patch_size", 1)
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    patch = 2 if config["_class_name"].startswith("Flux") else patch  # packed by its pipeline
    return 1024 // h * patch, max(1, 128 // max(1, t - 1)) if t > 1 else 1


def _tokens(size: Size, side: int, stride: int) -> int:
    frames, height, width = size
    return ((frames - 1) // stride + 1) * (height // side) * (width // side)


def _shrunk(size: Size, side: int, stride: int, most: int | None) -> Size:
    """`size` halved in time, then in space, until its tokens are few enough."""
    frames, height, width = size
    while most is not None and _tokens((frames, height, width), side, stride) > most:
        if frames > 4 * stride:
            frames = (frames - 1) // stride // 2 * stride + 1
        elif max(height, width) > 2 * side:
            height, width = (max(side, ceil(n / 2 / side) * side) for n in (height, width))
        else:
            break
    return frames, height, width
