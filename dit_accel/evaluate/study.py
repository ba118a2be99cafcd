"""Clips measured against dense ones of the same prompt and seed, each of them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.api import Handle, accelerated, restore
from dit_accel.config import AccelConfig
from dit_accel.evaluate import clips, look, perception
from dit_accel.evaluate.clips import Clip, Pair
from dit_accel.evaluate.dense import DenseClips
from dit_accel.evaluate.journal import Journal
from dit_accel.evaluate.probe import attention_share
from dit_accel.evaluate.recognition import Recogniser
from dit_accel.evaluate.rows import Row
from dit_accel.evaluate.weights import Weights
from dit_accel.generation.loading import Defaults, fingerprint, placement
from dit_accel.generation.request import Request, arguments
from dit_accel.generation.run import ProgressFn
from dit_accel.machine import describe, is_device_lost, is_out_of_memory
from dit_accel.media import quality

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class Study:
    """One pipeline, one setting, one folder: dense references and measured cells.

    base: size, steps and guidance of every clip; its prompt and seed are replaced.
    batch: clips in one call of the pipeline.
    recogniser: what tells emoji, or why there is none.
    trained: what the checkpoint in the pipeline was trained for; None: there is none.

    Raises ValueError when the request does not suit the pipeline, or the folder holds another
    setting.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        defaults: Defaults,
        base: Request,
        folder: Path,
        model: str = "",
        *,
        batch: int = 1,
        recogniser: Recogniser | str = "the training clips of this model are not at hand",
        trained: AccelConfig | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is a number of clips ≥ 1, not {batch}")
        self.pipe, self.defaults, self.base, self.folder = pipe, defaults, base, folder
        self.batch, self.recogniser, self.trained = batch, recogniser, trained
        values = arguments(pipe, defaults, base)
        self.steps: int = values.get("num_inference_steps") or 0
        if not self.steps:
            raise ValueError(f"{type(pipe).__name__} does not say its steps: give --steps")
        asked = {k: v for k, v in values.items() if k not in ("prompt", "generator")}
        self.setting: dict[str, Any] = {
            "model": model,
            "pipeline": type(pipe).__name__,
            **placement(pipe),
            "arguments": {k: str(v) for k, v in asked.items()},
            "batch": batch,
            "weights": fingerprint(pipe),
            "machine": describe(placement(pipe)["device"]),
        }
        restore(pipe)
        self.journal = Journal(folder / "cells.jsonl", self.setting)
        self.lpips = perception.find(pipe._execution_device)
        self.dense = DenseClips(pipe, defaults, base, folder / "dense", self.journal, self._seen)
        self._weights = Weights()
        self._warm: set[tuple[str, int]] = set()

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

    def known(self, row: Row, prompt: str, seed: int) -> dict[str, object] | None:
        """The cell, if it was measured before; what was refused is tried again."""
        cell = self.journal.lines.get(self.key(row, prompt, seed))
        if cell is None or "error" in cell:
            return None
        return {**cell, "row": row.name, "family": row.family}

    def attention(
        self, rows: Sequence[Row], prompt: str, seed: int, progress: ProgressFn
    ) -> dict[str, look.Errors]:
        """Row → layer → step → relative error of the attention output, each looked at once."""
        rows = look.looked_at(rows)
        keys = {row.name: f"attention {self.key(row, prompt, seed)}" for row in rows}
        fresh = [row for row in rows if keys[row.name] not in self.journal.lines]
        if fresh:
            request = replace(self.base, prompt=prompt, seed=seed)

            def named(phase: str, done: int, total: int | None) -> None:
                progress(f"attention of {len(fresh)} rows: {phase}", done, total)

            found = look.errors(self.pipe, self.defaults, request, fresh, named)
            for row in fresh:
                self.journal.add(keys[row.name], {"errors": found.get(row.name, {})})
        lines = {name: self.journal.lines[key]["errors"] for name, key in keys.items()}
        return {name: _whole(errors) for name, errors in lines.items() if errors}

    def cell(self, row: Row, prompt: str, seed: int) -> dict[str, Any]:
        """One measured cell; a row this pipeline refuses gives {"error": why}."""
        return self.cells(row, [(prompt, seed)])[0]

    def cells(self, row: Row, pairs: Sequence[Pair]) -> list[dict[str, object]]:
        """The cells of one call; halved, and halved again, where memory does not suffice."""
        known = [cell for pair in pairs if (cell := self.known(row, *pair)) is not None]
        if len(known) == len(pairs):
            return known
        share, dense, smaller = self.share, self.dense.of(pairs), False
        try:
            found = self._measure(row, pairs, dense, share)
        except (ValueError, RuntimeError) as error:
            smaller = is_out_of_memory(error) and len(pairs) > 1
            if not smaller and (is_out_of_memory(error) or is_device_lost(error)):
                raise
            found = [{"error": str(error)}] * len(pairs)
        if smaller:
            clips.free()
            half = len(pairs) // 2
            return [*self.cells(row, pairs[:half]), *self.cells(row, pairs[half:])]
        heads = [{"row": row.name, "family": row.family, "prompt": p, "seed": s} for p, s in pairs]
        return [
            self.journal.add(self.key(row, *pair), {**head, **cell})
            for pair, head, cell in zip(pairs, heads, found, strict=True)
        ]

    def _measure(
        self, row: Row, pairs: Sequence[Pair], dense: Sequence[Clip], share: float
    ) -> list[dict[str, object]]:
        steps = row.steps or self.base.steps
        requests = [replace(self.base, prompt=p, seed=s, steps=steps) for p, s in pairs]
        with self._weights.of(self.pipe, row):
            self._warm_up(row, requests)
            row.boost.check(self.pipe)
            with row.boost.cached(self.pipe), accelerated(self.pipe, row.config) as handle:
                made = clips.make(self.pipe, self.defaults, requests)
                ran = handle.report()
                attention, work = kept_work(handle, share)
        ratio = (row.steps or self.steps) / self.steps
        common = {
            "attention_kept": attention * ratio,
            "work_kept": work * ratio,
            "state_bytes": ran.state_bytes,
            "unplanned": ran.unplanned,
            "together": len(pairs),
        }
        return [
            {
                **common,
                "seconds": clip.seconds,
                "wall": clip.wall,
                "dense_seconds": reference.seconds,
                "speedup": reference.seconds / clip.seconds,
                **self.closeness(reference, clip),
                **seen,
            }
            for reference, clip, seen in zip(dense, made, self._seen(pairs, made), strict=True)
        ]

    def closeness(self, dense: Clip, made: Clip) -> dict[str, object]:
        """PSNR, SSIM, flicker, latent error and LPIPS of a clip against its reference."""
        near = quality.quality(dense.frames, made.frames)
        out = {"psnr": near.psnr_mean, "ssim": near.ssim_mean, "flicker": list(near.flicker)}
        if dense.latents is not None and made.latents is not None:
            out["latent_error"] = quality.latent_error(dense.latents, made.latents)
        if not isinstance(self.lpips, str):
            out["lpips"] = self.lpips(dense.frames, made.frames)
        return out

    def _seen(self, pairs: Sequence[Pair], made: Sequence[Clip]) -> list[dict[str, bool]]:
        if isinstance(self.recogniser, str):
            return [{}] * len(made)
        return self.recogniser.judge([prompt for prompt, _ in pairs], [c.frames for c in made])

    def _warm_up(self, row: Row, requests: Sequence[Request]) -> None:
        """The first sparse steps of a method pay for set-up: run some that are not timed."""
        method = row.config.method
        if (method.name, len(requests)) in self._warm:
            return
        schedule = replace(row.config.schedule, warmup=0, cooldown=0)
        with accelerated(self.pipe, replace(row.config, schedule=schedule)):
            clips.warm(self.pipe, self.defaults, requests, 2 if method.stateful else 1)
        self._warm.add((method.name, len(requests)))


def kept_work(handle: Handle, share: float) -> tuple[float, float]:
    """(attention, all) FLOPs of the generation that ran, over those of a dense one of its steps.

    share: of attention in a dense forward. Where t of the tokens run a part f of the blocks,
    attention is 1 − f(1 − t²) and the rest 1 − f(1 − t) of a whole forward; of a step that a cache
    skips, the layers that ran count. Overheads of a method (block scores, pooled keys) do not.
    """
    spans = handle.spans
    part = (spans[0].last - spans[0].first) / spans[0].blocks if spans else 0.0
    steps = handle.report().steps
    calls = [s["sparse"] + s["dense"] for s in steps]
    ran = [(count / max(calls), s) for count, s in zip(calls, steps, strict=True)]
    attention = [r * s["kept"] * (1 - part * (1 - s["tokens"] ** 2)) for r, s in ran]
    rest = [r * (1 - part * (1 - s["tokens"])) for r, s in ran]
    mean = sum(attention) / len(steps)
    return mean, share * mean + (1 - share) * sum(rest) / len(steps)


def _whole(errors: dict[Any, dict[Any, float]]) -> look.Errors:
    """Layers and steps as numbers: JSON has them as text."""
    return {int(n): {int(s): e for s, e in steps.items()} for n, steps in errors.items()}
