"""What is asked of a pipeline, and whether it can be made."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.generation.limits import LONGEST, check_limits
from dit_accel.generation.loading import Defaults
from dit_accel.inputs import fields
from dit_accel.inputs.scene import Vocabulary
from dit_accel.pipelines.denoisers import transformers_of
from dit_accel.samplers.grids import Sampler

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


_ARGUMENTS = {
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "negative_prompt": "negative_prompt",
    "image": "image",
}


@dataclass(frozen=True)
class Request:
    """What the user asks of a pipeline; None takes the model's default.

    prompt, negative_prompt: what to show, and what not.
    seed: of the noise.
    steps: of denoising.
    height, width: pixels.
    frames: of the clip.
    guidance: the pipeline's guidance scale.
    image: where a clip or an edit starts from.
    sampler: a grid of few steps in words (see samplers.Sampler); None is the pipeline's own.

    Raises ValueError for a value that no pipeline could take; `arguments` checks the rest against
    one pipeline.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    image: Any = None
    sampler: str | None = None

    def __post_init__(self) -> None:
        fields.check(self)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what to show")
        for name in ("prompt", "negative_prompt"):
            length = len(getattr(self, name) or "")
            if length > LONGEST:
                raise ValueError(f"{name} has {length} letters: at most {LONGEST} are taken")
        check_limits(vars(self))
        if self.sampler is not None:
            sampler = Sampler.named(self.sampler)
            sampler.sigmas(self.steps or sampler.steps)


def arguments(pipe: DiffusionPipeline, defaults: Defaults, request: Request) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call; ValueError for what it cannot take.

    A model that was trained on scenes takes prompts of its grammar only (dit_accel.inputs.scene).
    """
    folder = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    if folder and (vocabulary := Vocabulary.load(Path(folder))):
        vocabulary.read(request.prompt)
    return of_any_prompt(pipe, defaults, request)


def of_any_prompt(pipe: DiffusionPipeline, defaults: Defaults, request: Request) -> dict[str, Any]:
    """`arguments`, whatever the prompt says: for a caller that puts another in its place."""
    known = inspect.signature(type(pipe).__call__).parameters
    kind = type(pipe).__name__
    asked = {}
    for field_name, argument in _ARGUMENTS.items():
        value = getattr(request, field_name)
        if value is None:
            continue
        if argument not in known:
            raise ValueError(f"{kind} takes no {field_name.replace('_', ' ')}: leave it out")
        asked[argument] = value
    if "image" not in asked and "image" in known and known["image"].default is known["image"].empty:
        raise ValueError(f"{kind} starts from a picture: give one with --image")
    _check_sizes(pipe, asked)
    values = {n: v for n, v in vars(defaults).items() if v is not None and n in known}
    values |= _of_sampler(request, known)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    values = {"prompt": request.prompt, **values, **asked, "generator": generator}
    installed: Any = getattr(pipe, "scheduler", None)
    if request.sampler is None and type(installed).__name__ == "GridScheduler":
        installed.sampler.sigmas(values.get("num_inference_steps") or installed.sampler.steps)
    return values


def _of_sampler(request: Request, known: Any) -> dict[str, Any]:
    """What a sampler sets where nothing else is asked: its steps, and no guidance where the model
    is distilled for it."""
    if request.sampler is None:
        return {}
    sampler = Sampler.named(request.sampler)
    usual: dict[str, Any] = {"num_inference_steps": sampler.steps}
    usual |= {"guidance_scale": 1.0} if sampler.distilled else {}
    return {name: value for name, value in usual.items() if name in known}


def _check_sizes(pipe: DiffusionPipeline, asked: dict[str, Any]) -> None:
    side, frames = granularity(pipe)
    for name in ("height", "width"):
        if asked.get(name, 0) % side:
            near = max(side, round(asked[name] / side) * side)
            raise ValueError(
                f"{name} is a multiple of {side} for this model, not {asked[name]}: try {near}"
            )
    if (asked.get("num_frames", 1) - 1) % frames:
        near = round((asked["num_frames"] - 1) / frames) * frames + 1
        raise ValueError(
            f"frames is a multiple of {frames} plus one for this model, "
            f"not {asked['num_frames']}: try {near}"
        )


def granularity(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(n, t): sides are multiples of n pixels and frames are t·k + 1 for this pipeline."""
    names = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    scale = next((getattr(pipe, name) for name in names if hasattr(pipe, name)), 8)
    transformer = transformers_of(pipe)[0]
    patch = getattr(transformer.config, "patch_size", 1)
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    processor = getattr(pipe, "video_processor", None) or getattr(pipe, "image_processor", None)
    packed = processor.config.vae_scale_factor if processor is not None else 1
    in_time = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    frames = next((getattr(pipe, name) for name in in_time if hasattr(pipe, name)), 1)
    return max(scale * patch, packed), frames


def unknown_words(pipe: DiffusionPipeline, prompt: str) -> list[str]:
    """Words of the prompt that a word-level tokenizer does not know; empty for other tokenizers."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or getattr(tokenizer, "unk_token_id", None) is None:
        return []
    words = prompt.split()
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    return [w for w, i in zip(words, ids, strict=True) if tokenizer.unk_token_id in i]
