"""Making the data: the model's own samples, or a folder of clips with captions, as latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_accel.finetune import data
from dit_accel.finetune.record import Conditions, record
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request, arguments
from dit_accel.inputs.data import read_json
from dit_accel.inputs.table import read_table
from dit_accel.inputs.text import read
from dit_accel.media import video
from dit_accel.media.pictures import read_picture
from dit_accel.pipelines.denoisers import call as call_pipeline

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


SHARD = 16
ProgressFn = Callable[[str, int, int | None], None]
Source = tuple[str, Any]  # caption, and the seed or the file its latents come from


@torch.no_grad()
def own_samples(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    prompts: list[str],
    number: int,
    seed: int,
    folder: Path,
    progress: ProgressFn,
    part: tuple[int, int] = (0, 1),
    batch: int = 1,
) -> None:
    """Latents that the dense model makes from `prompts` in turn, each from a seed of its own.

    `batch` of them are made in one call of the pipeline.
    """
    sources = [(prompts[i % len(prompts)], seed + i) for i in range(number)]

    def make(some: list[Source]) -> list[Tensor]:
        call = arguments(pipe, defaults, Request(some[0][0]))
        call["prompt"] = [caption for caption, _ in some]
        call["generator"] = [torch.Generator("cpu").manual_seed(start) for _, start in some]
        if call.get("negative_prompt") is not None:
            call["negative_prompt"] = [call["negative_prompt"]] * len(some)
        return list(call_pipeline(pipe, **call, output_type="latent")[0].split(1))

    phase = "making the model's samples"
    _write(pipe, defaults, sources, make, folder, phase, progress, part, batch)


@torch.no_grad()
def encode_clips(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    clips: Path,
    folder: Path,
    progress: ProgressFn,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Latents of the clips that captions.json or captions.csv of `clips` names, by pipe.vae."""
    sources = read_captions(clips)
    options = _sizes(pipe, defaults)

    def make(some: list[Source]) -> list[Tensor]:
        return [encode(pipe, load_clip(file, *options, defaults.fps)) for _, file in some]

    _write(pipe, defaults, sources, make, folder, "encoding clips", progress, part)


def _write(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    sources: list[Source],
    make: Callable[[list[Source]], list[Tensor]],
    folder: Path,
    phase: str,
    progress: ProgressFn,
    part: tuple[int, int],
    batch: int = 1,
) -> None:
    """Write the shards of this process (`part` = its number, how many there are).

    A shard that stands from an earlier run with the same sources is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record(pipe, defaults, defaults.negative_prompt or "")  # refuses unsuitable models at once
    shards = [sources[i : i + SHARD] for i in range(0, len(sources), SHARD)]
    for number, shard in enumerate(shards):
        path, label = folder / data.shard_name(number), _label(pipe, defaults, shard)
        if number % part[1] != part[0] or data.shard_label(path) == label:
            continue
        (folder / data.INDEX).unlink(missing_ok=True)
        conditions = [record(pipe, defaults, caption) for caption, _ in shard]
        latents: list[Tensor] = []
        for place in range(0, len(shard), batch):
            progress(phase, number * SHARD + place, len(sources))
            latents += make(shard[place : place + batch])
            _check_latents(pipe, latents[-1], conditions[-1])
        data.save_shard(path, latents, conditions, label)


def finish(pipe: DiffusionPipeline, defaults: Defaults, captions: list[str], folder: Path) -> None:
    """Write the index, once all processes have written their shards."""
    base = record(pipe, defaults, defaults.negative_prompt or "")
    shards = [captions[i : i + SHARD] for i in range(0, len(captions), SHARD)]
    data.save_index(folder, type(pipe.transformer).__name__, shards, base)


def _label(pipe: DiffusionPipeline, defaults: Defaults, shard: list[Source]) -> str:
    what = [type(pipe.transformer).__name__, getattr(pipe, "name_or_path", ""), vars(defaults)]
    return hashlib.sha256(json.dumps([what, shard], default=str).encode()).hexdigest()


def _check_latents(pipe: DiffusionPipeline, latents: Tensor, known: Conditions) -> None:
    if tuple(latents.shape) != known.shape:
        raise ValueError(
            f"{type(pipe).__name__} gives its transformer {list(known.shape)} where the latents "
            f"are {list(latents.shape)}: only models without packed or conditioned latents are "
            "served here"
        )
    if not latents.isfinite().all():
        raise ValueError("the latents are not finite: try --precision no")


def read_captions(folder: Path) -> list[Source]:
    """(caption, file) of captions.json, a list of {"file", "caption"}, or of captions.csv.

    Raises ValueError naming the first entry that has no caption or whose file is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder of clips {folder}")
    table, listing = folder / "captions.csv", folder / "captions.json"
    if not (table.is_file() or listing.is_file()):
        raise ValueError(f"{folder} has neither captions.json nor captions.csv")
    try:
        rows = _rows(table) if table.is_file() else read_json(listing, "captions")
        found = [(row["caption"].strip(), folder / row["file"]) for row in rows]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"the captions in {folder} are not rows of file and caption") from None
    if not found:
        raise ValueError(f"the captions in {folder} name no clip")
    for caption, file in found:
        if not caption or not file.is_file():
            what = "has no caption" if file.is_file() else "does not exist"
            raise ValueError(f"{file}, named in the captions, {what}")
    return found


def _rows(table: Path) -> list[dict[str, str]]:
    rows = []
    for line, row in read_table(read(table, "captions"))[1]:
        if isinstance(row, ValueError):
            raise ValueError(f"captions {table}, line {line}: {row}")
        rows.append(row)
    return rows


def _sizes(pipe: DiffusionPipeline, defaults: Defaults) -> tuple[int, int, int]:
    """(frames, height, width) of the pipeline's clips."""
    if defaults.height is None or defaults.width is None:
        raise ValueError(f"{type(pipe).__name__} has no default size: give --size")
    return defaults.num_frames or 1, defaults.height, defaults.width


def load_clip(path: Path, frames: int, height: int, width: int, fps: float) -> Tensor:
    """[1, 3, T, H, W] in [−1, 1]: the start of a clip at `fps`, scaled and cropped to the middle.

    Raises ValueError for a clip that is too short or cannot be read.
    """
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        every, rate = np.asarray(read_picture(path))[None], fps
    else:
        every, rate = video.read(path), video.rate(path) or fps
    picked = [round(i * rate / fps) for i in range(frames)]
    if picked[-1] >= len(every):
        raise ValueError(
            f"{path} has {len(every)} frames at {rate:g} a second, but {frames} at {fps:g} a "
            "second are needed: take longer clips, or give fewer --frames"
        )
    fitted = np.stack([_fit(every[i], height, width) for i in picked])
    return torch.from_numpy(fitted).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def _fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W, 3] scaled to cover height × width, then its middle."""
    scale = max(height / frame.shape[0], width / frame.shape[1])
    size = (max(width, round(frame.shape[1] * scale)), max(height, round(frame.shape[0] * scale)))
    scaled = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return scaled[top : top + height, left : left + width]


def encode(pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
    """Latents of [1, 3, T, H, W] pixels as the transformer sees them: normalised, not packed."""
    vae = pipe.vae
    config = vae.config
    moving = vae.encoder.conv_in.weight.ndim == 5
    pixels = pixels.to(vae.device, vae.dtype)
    latents = vae.encode(pixels if moving else pixels[:, :, 0]).latent_dist.mode().float()
    if getattr(config, "latents_mean", None) is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (
            torch.tensor(x, device=latents.device).view(shape)
            for x in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
