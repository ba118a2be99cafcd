"""The same prompt and seed, dense and accelerated: clips, contact sheet, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

import dit_accel
from dit_accel.api import accelerated, restore
from dit_accel.config import AccelConfig
from dit_accel.generation.boost import STOCK, Boost
from dit_accel.generation.facts import facts_of
from dit_accel.generation.ledger import Ledger
from dit_accel.generation.loading import EMBEDDED, EMBEDDED_NAME, Defaults, placement
from dit_accel.generation.recipe import recipe
from dit_accel.generation.request import Request, arguments
from dit_accel.generation.run import ProgressFn, Result, generate, rehearse, warm_up
from dit_accel.generation.stock import stock
from dit_accel.generation.trained import Trained
from dit_accel.machine import describe
from dit_accel.media import quality, video
from dit_accel.media.files import check_folder, check_own, elsewhere, write_text
from dit_accel.media.metadata import KEY, Facts
from dit_accel.pages import comparison as html

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


Clips = dict[str, tuple[np.ndarray, Facts | None]]
CLIPS = ("dense", "accelerated", "side_by_side")


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: `data` is what report.json holds; `files` are the paths written."""

    data: dict[str, Any]
    files: dict[str, Path]


def compare(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    request: Request,
    config: AccelConfig,
    out: str | Path,
    *,
    boost: Boost = STOCK,
    trained: Trained | None = None,
    model: str = "",
    command: str = "",
    metadata: bool = True,
    progress: ProgressFn = lambda phase, done, total: None,
) -> Comparison:
    """Generate dense, then accelerated from the same seed, and write what came of it to `out`.

    One dense and one accelerated step run first, untimed, so that neither run pays for set-up; for
    CUDA graphs both runs instead, twice, in which these are recorded. boost: compilation and graphs
    are for both, the rest of it is for the accelerated run. trained: the checkpoint that is in the
    pipeline. metadata: the clips carry what they were made from. The pipeline is left stock. Raises
    ValueError before anything runs when the request does not suit it or `out` cannot be written or
    holds such files; NotWritten, with where they are kept, after it.
    """
    values = arguments(pipe, defaults, request)
    folder = check_output(out)
    restore(pipe)
    boost.check(pipe)
    with boost.compiled(pipe):
        if not boost.graphs:
            _warm_up(pipe, defaults, request, config, progress)
        dense = _dense(pipe, defaults, request, boost, progress)
        fast, ran, cells = _accelerated(pipe, defaults, request, config, boost, progress)
    progress("writing", 0, None)
    values = {k: v for k, v in values.items() if k != "generator"}
    model = EMBEDDED_NAME if model == str(EMBEDDED) else model
    where = {"model": model, "pipeline": type(pipe).__name__, **placement(pipe)}
    data = {
        "prompt": request.prompt,
        "seed": request.seed,
        "fps": defaults.fps,
        **where,
        "size": list(dense.frames.shape[:3]),
        "arguments": values,
        "boost": asdict(boost),
        "sampler": request.sampler,
        "checkpoint": None if trained is None else trained.to_dict(),
        "python": recipe(config, where, values, request.seed, boost, request.sampler, trained),
        "command": command,
        **_findings(dense, fast, ran),
        "cells": cells,
        "machine": describe(placement(pipe)["device"]),
    }
    told: dict[str, Any] = {"sampler": request.sampler, "command": command}
    told |= {"trained": trained, "model": model, "fps": defaults.fps}
    both = Boost(compile=boost.compile, graphs=boost.graphs)
    sides = ((None, both), (config, boost))
    about = [facts_of(pipe, values, request.seed, x, boost=b, **told) for x, b in sides]
    clips = _clips(dense, fast, about if metadata else [None, None])
    return Comparison(data, _write_or_rescue(folder, data, clips))


def _clips(dense: Result, fast: Result, facts: Sequence[Facts | None]) -> Clips:
    return {"dense": (dense.frames, facts[0]), "accelerated": (fast.frames, facts[1])}


def check_output(out: str | Path) -> Path:
    """The folder of a comparison; ValueError where it cannot be written, or holds other files."""
    folder = check_folder(out)
    clips = (f"{name}.{kind}" for name in CLIPS for kind in ("mp4", "png"))
    check_own(folder, "report.json", (*clips, "contact_sheet.png", "report.html"))
    return folder


def _named(name: str, progress: ProgressFn) -> ProgressFn:
    return lambda phase, done, total: progress(f"{name}: {phase}", done, total)


def _dense(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    request: Request,
    boost: Boost,
    progress: ProgressFn,
) -> Result:
    with stock(pipe):
        if boost.graphs:
            rehearse(pipe, defaults, request, progress)
        return generate(pipe, defaults, request, _named("dense", progress))


def _warm_up(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    request: Request,
    config: AccelConfig,
    progress: ProgressFn,
) -> None:
    progress("warm-up", 0, 2)
    with stock(pipe):
        warm_up(pipe, defaults, request)
    progress("warm-up", 1, 2)
    sparse_at_once = replace(config, schedule=replace(config.schedule, warmup=0, cooldown=0))
    steps = 1
    if config.prune is not None:  # its first step runs all tokens
        sparse_at_once = replace(sparse_at_once, prune=replace(config.prune, start=0, end=0))
        steps = 2
    with accelerated(pipe, sparse_at_once):
        warm_up(pipe, defaults, request, steps)
    progress("warm-up", 2, 2)


def _accelerated(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    request: Request,
    config: AccelConfig,
    boost: Boost,
    progress: ProgressFn,
) -> tuple[Result, dict[str, Any], list[Any]]:
    """The run, its report and the cells of its ledger."""
    ledger, named = Ledger(), _named(config.method.name, progress)
    with boost.beside(pipe), accelerated(pipe, config) as handle:
        if boost.graphs:
            rehearse(pipe, defaults, request, progress)
        handle.forget()
        fast = generate(
            pipe, defaults, request, named, lambda step, _: ledger.read(handle.report())
        )
        return fast, handle.report().to_dict(), ledger.cells


def _findings(dense: Result, fast: Result, ran: dict[str, object]) -> dict[str, object]:
    near = quality.quality(dense.frames, fast.frames).to_dict()
    if dense.latents is not None and fast.latents is not None:
        near["latent_error"] = quality.latent_error(dense.latents, fast.latents)
    speedup = {
        "denoise": dense.times.denoise / fast.times.denoise,
        "total": dense.times.total / fast.times.total,
    }
    if dense.times.steps:
        speedup["median_step"] = median(dense.times.steps) / median(fast.times.steps)
    return {
        "method": ran["method"],
        "kept": ran["kept"],
        "speedup": speedup,
        "times": {"dense": asdict(dense.times), "accelerated": asdict(fast.times)},
        "memory": {"dense": asdict(dense.memory), "accelerated": asdict(fast.memory)},
        "quality": near,
        "attention": ran,
    }


def _write_or_rescue(folder: Path, data: dict[str, object], clips: Clips) -> dict[str, Path]:
    try:
        return _write(folder, data, clips)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        kept = elsewhere(clips["dense"][0].nbytes // 4)
        if kept is None:
            raise video.NotWritten(f"{folder} cannot be written ({why})") from error
        _write(kept, data, clips)
        raise video.NotWritten(f"{folder} cannot be written ({why}): all is in {kept}") from error


def _write(folder: Path, data: dict[str, Any], clips: Clips) -> dict[str, Path]:
    (dense, _), (fast, facts) = clips.values()
    write_text(
        folder / "report.json", json.dumps({KEY: dit_accel.__version__})
    )  # the folder is ours
    kind = "mp4" if len(dense) > 1 else "png"
    names = ("dense", f"accelerated ({data['method']})")
    both = facts and {**facts, "shows": "dense beside accelerated"}
    clips = {**clips, "side_by_side": (video.side_by_side(dense, fast, names), both)}
    files = {name: folder / f"{name}.{kind}" for name in CLIPS}
    for name, path in files.items():
        frames, about = clips[name]
        video.save(path, frames, data["fps"], about)
    files["contact_sheet"] = folder / "contact_sheet.png"
    video.save(files["contact_sheet"], video.contact_sheet(dense, fast, names)[None], facts=both)
    data["files"] = {name: path.name for name, path in files.items()}
    files["report"] = folder / "report.json"
    write_text(files["report"], json.dumps(data, indent=2, default=str) + "\n")
    files["page"] = write_text(folder / "report.html", html.page(data, folder))
    return files
