"""Clips measured against dense ones of the same prompt and seed, each of them once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import metrics, video
from dit_accel.api import Handle, accelerated, restore
from dit_accel.compare import machine, placement
from dit_accel.evaluate.journal import Journal
from dit_accel.evaluate.rows import Row
from dit_accel.generate import Request, Result, arguments, generate, warm_up
from dit_accel.loading import Defaults
from dit_accel.probe import attention_share


@dataclass(frozen=True)
class Clip:
    """A dense reference: uint8 frames [T, H, W, 3], final latents, seconds of the loop."""

    frames: np.ndarray
    latents: torch.Tensor | None
    seconds: float


class Study:
    """One pipeline, one setting, one folder: dense references and measured cells.

    base: size, steps and guidance of every clip; its prompt and seed are replaced. Raises
    ValueError when the request does not suit the pipeline, or the folder holds another setting.
    """

    def __init__(
        self, pipe: Any, defaults: Defaults, base: Request, folder: Path, model: str = ""
    ) -> None:
        self.pipe, self.defaults, self.base, self.folder = pipe, defaults, base, folder
        values = arguments(pipe, defaults, base)
        self.steps: int = values.get("num_inference_steps") or 0
        if not self.steps:
            raise ValueError(f"{type(pipe).__name__} does not say its steps: give --steps")
        asked = {k: v for k, v in values.items() if k not in ("prompt", "generator")}
        self.setting = {
            "model": model,
            "pipeline": type(pipe).__name__,
            **placement(pipe),
            "arguments": {k: str(v) for k, v in asked.items()},
            "machine": machine(pipe),
        }
        restore(pipe)
        self.journal = Journal(folder / "cells.jsonl", self.setting)
        self._share: float | None = None
        self._warm: set[str] = set()
        self._clips: tuple[str, Clip] | None = None

    @property
    def share(self) -> float:
        """Share of self-attention in the FLOPs of a dense step, counted once."""
        known = self.journal.lines.get("attention share")
        if known is None:
            share = attention_share(self.pipe, self.defaults, self.base)
            known = self.journal.add("attention share", {"share": share})
        return known["share"]

    def key(self, row: Row, prompt: str, seed: int) -> str:
        return f"{row.digest} #{seed} {prompt}"

    def known(self, row: Row, prompt: str, seed: int) -> dict[str, Any] | None:
        """The cell, if it was measured before; what was refused is tried again."""
        cell = self.journal.lines.get(self.key(row, prompt, seed))
        if cell is None or "error" in cell:
            return None
        return {**cell, "row": row.name, "family": row.family}

    def reference(self, prompt: str, seed: int) -> Clip:
        """The dense clip, from the folder or made now."""
        name = hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:16]
        if self._clips is None or self._clips[0] != name:
            path = self.folder / "dense" / f"{name}.npz"
            self._clips = name, _load(path) if path.is_file() else self._make(path, prompt, seed)
        return self._clips[1]

    def _make(self, path: Path, prompt: str, seed: int) -> Clip:
        request = replace(self.base, prompt=prompt, seed=seed)
        if "dense" not in self._warm:
            warm_up(self.pipe, self.defaults, request)
            self._warm.add("dense")
        made = generate(self.pipe, self.defaults, request)
        clip = Clip(made.frames, made.latents, made.times.denoise)
        _save(path, clip)
        return clip

    def cell(self, row: Row, prompt: str, seed: int) -> dict[str, Any]:
        """The measured cell; a row this pipeline refuses gives {"error": why}."""
        known = self.known(row, prompt, seed)
        if known is not None:
            return known
        share, dense = self.share, self.reference(prompt, seed)
        head = {"row": row.name, "family": row.family, "prompt": prompt, "seed": seed}
        try:
            found = self._measure(row, prompt, seed, dense, share)
        except (ValueError, RuntimeError) as error:
            if "out of memory" in str(error).lower():
                raise
            found = {"error": str(error)}
        return self.journal.add(self.key(row, prompt, seed), {**head, **found})

    def _measure(
        self, row: Row, prompt: str, seed: int, dense: Clip, share: float
    ) -> dict[str, Any]:
        request = replace(self.base, prompt=prompt, seed=seed, steps=row.steps or self.base.steps)
        self._warm_up(row, request)
        with accelerated(self.pipe, row.config) as handle:
            made = generate(self.pipe, self.defaults, request)
            ran = handle.report()
            attention, work = kept_work(handle, share)
        ratio = (row.steps or self.steps) / self.steps
        return {
            "attention_kept": attention * ratio,
            "work_kept": work * ratio,
            "seconds": made.times.denoise,
            "dense_seconds": dense.seconds,
            "speedup": dense.seconds / made.times.denoise,
            **closeness(dense, made),
            "state_bytes": ran.state_bytes,
            "unplanned": ran.unplanned,
        }

    def _warm_up(self, row: Row, request: Request) -> None:
        """The first sparse step of a method pays for set-up: run one that is not timed."""
        name = row.config.method.name
        if name in self._warm:
            return
        schedule = replace(row.config.schedule, warmup=0, cooldown=0)
        with accelerated(self.pipe, replace(row.config, schedule=schedule)):
            warm_up(self.pipe, self.defaults, request)
        self._warm.add(name)


def closeness(dense: Clip, made: Result) -> dict[str, Any]:
    """PSNR, SSIM, flicker and latent error of a clip against its reference."""
    near = metrics.quality(dense.frames, made.frames)
    out = {"psnr": near.psnr_mean, "ssim": near.ssim_mean, "flicker": list(near.flicker)}
    if dense.latents is not None and made.latents is not None:
        out["latent_error"] = metrics.latent_error(dense.latents, made.latents)
    return out


def kept_work(handle: Handle, share: float) -> tuple[float, float]:
    """(attention, all) FLOPs of the generation that ran, over those of a dense one of its steps.

    share: of attention in a dense forward. Where t of the tokens run a part f of the blocks,
    attention is 1 − f(1 − t²) and the rest 1 − f(1 − t) of a whole forward; overheads of a method
    (block scores, pooled keys) are not counted.
    """
    spans = handle._engine.spans
    part = (spans[0].last - spans[0].first) / spans[0].blocks if spans else 0.0
    steps = handle.report().steps
    attention = [s["kept"] * (1 - part * (1 - s["tokens"] ** 2)) for s in steps]
    rest = [1 - part * (1 - s["tokens"]) for s in steps]
    mean = sum(attention) / len(steps)
    return mean, share * mean + (1 - share) * sum(rest) / len(steps)


def _save(path: Path, clip: Clip) -> None:
    latents = np.empty(0) if clip.latents is None else clip.latents.float().cpu().numpy()
    with video.atomic(path) as temporary:
        np.savez(temporary, frames=clip.frames, latents=latents, seconds=clip.seconds)


def _load(path: Path) -> Clip:
    with np.load(path) as data:
        latents = torch.from_numpy(data["latents"]) if data["latents"].size else None
        return Clip(data["frames"], latents, float(data["seconds"]))
