"""What a finished pair leaves behind: clips, configurations, Python lines, and one JSON record."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_accel.app.studio import Pair, Run
from dit_accel.config import AccelConfig
from dit_accel.generation.loading import EMBEDDED_NAME, placement
from dit_accel.generation.recipe import recipe
from dit_accel.machine import describe
from dit_accel.media import quality, video
from dit_accel.media.files import atomic
from dit_accel.methods.dense import Dense
from dit_accel.methods.learned import Learned

RECORD = "comparison.json"


def clip(run: Run, folder: Path) -> str:
    """Write one side's clip (a picture where there is one frame), once; the name of its file."""
    path = folder / f"{run.name}.{'mp4' if len(run.result.frames) > 1 else 'png'}"
    if not path.exists():
        video.save(path, run.result.frames, run.fps, run.facts)
    return path.name


def record(pair: Pair, folder: Path, asked: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write every file of a pair to `folder` and return its record, JSON-able, without paths.

    asked: what the form held, for whoever opens the record again.
    """
    left, right = pair.left, pair.right
    moving = len(left.result.frames) > 1
    what, where = pair.ask.what, _where(pair)
    fps = left.fps
    near = quality.quality(left.result.frames, right.result.frames).to_dict()
    if left.result.latents is not None and right.result.latents is not None:
        near["latent_error"] = quality.latent_error(left.result.latents, right.result.latents)
    data = {
        "dit_accel": version("dit-accel"),
        "prompt": what.prompt.strip(),
        "seed": what.seed,
        "asked": asked or {},
        "fps": fps,
        "size": list(left.result.frames.shape[:3]),
        "steps": len(left.result.times.steps),
        **where,
        "checkpoint": None if pair.trained is None else pair.trained.to_dict(),
        "machine": describe(placement(pair.pipe)["device"]),
        "quality": near,
        "left": _side(left, where, pair, folder),
        "right": _side(right, where, pair, folder),
        "speedup": {
            part: getattr(left.result.times, part) / getattr(right.result.times, part)
            for part in ("denoise", "total")
        },
    }
    both = video.side_by_side(left.result.frames, right.result.frames, (left.label, right.label))
    name = "side_by_side." + ("mp4" if moving else "png")
    facts = right.facts and {**right.facts, "shows": "left beside right"}
    data["both"] = video.save(folder / name, both, fps, facts).name
    with atomic(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(data, indent=1, default=str) + "\n", "utf-8")
    return data


def _where(pair: Pair) -> dict[str, str]:
    model = EMBEDDED_NAME if pair.ask.model is None else pair.ask.model
    return {"model": model, "pipeline": type(pair.pipe).__name__, **placement(pair.pipe)}


def _sight(run: Run, folder: Path) -> str | None:
    """Write which blocks were read; the name of the file."""
    if run.sight is None:
        return None
    path = folder / f"{run.name}-attention.json"
    path.write_text(json.dumps(run.sight), "utf-8")
    return path.name


def _side(run: Run, where: dict[str, str], pair: Pair, folder: Path) -> dict[str, Any]:
    config, what = pair.ask.config(run.how) or AccelConfig(Dense()), pair.ask.what
    values = {name: value for name, value in pair.values.items() if name != "generator"}
    python = recipe(config, where, values, what.seed, run.how.boost(), what.sampler, pair.trained)
    preset, script = f"{run.name}.json", f"{run.name}.py"
    if not _in_memory(config):
        config.save(folder / preset)
    (folder / script).write_text(f"{python}\n", encoding="utf-8")
    return {
        "label": run.label,
        "skips": run.how.step_cache is not None,
        "clip": clip(run, folder),
        "config": None if _in_memory(config) else preset,
        "script": script,
        "python": f"{python}\n",
        "attention": _sight(run, folder),
        "times": asdict(run.result.times),
        "report": run.report,
        "cells": run.cells,
    }


def _in_memory(config: AccelConfig) -> bool:
    """Whether a method's learned tensors came with a checkpoint: its JSON alone would lose them."""
    method = config.method
    return isinstance(method, Learned) and not method.weights and bool(method.tensors())
