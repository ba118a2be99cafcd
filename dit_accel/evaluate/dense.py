"""The dense clips that all others are held against: each is made once and kept in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dit_accel.evaluate import clips
from dit_accel.evaluate.clips import Clip, Pair
from dit_accel.evaluate.journal import Journal
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.machine import is_out_of_memory
from dit_accel.media import quality
from dit_accel.media.files import atomic

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@dataclass
class DenseClips:
    """The dense clips of one pipeline and setting.

    pipe, defaults: as loaded.
    base: size, steps and guidance of every clip; its prompt and seed are replaced.
    folder: of the clips.
    journal: of what each is like by itself.
    seen: what is recognised in clips of these prompts and seeds.
    """

    pipe: DiffusionPipeline
    defaults: Defaults
    base: Request
    folder: Path
    journal: Journal
    seen: Callable[[Sequence[Pair], Sequence[Clip]], list[dict[str, bool]]]
    _warm: set[int] = field(default_factory=set)
    _last: tuple[Sequence[Pair], list[Clip]] = ((), [])

    def known(self, prompt: str, seed: int) -> dict[str, object] | None:
        """What the clip is like by itself, if it was made."""
        return self.journal.lines.get(f"dense #{seed} {prompt}")

    def of(self, pairs: Sequence[Pair]) -> list[Clip]:
        """The clips, from the folder or made now."""
        if self._last[0] != pairs:
            self._last = pairs, self._load(pairs) or self._make(pairs)
        return self._last[1]

    def _path(self, pair: Pair) -> Path:
        name = hashlib.sha256(f"{pair[1]} {pair[0]}".encode()).hexdigest()[:16]
        return self.folder / f"{name}.npz"

    def _load(self, pairs: Sequence[Pair]) -> list[Clip] | None:
        paths = [self._path(pair) for pair in pairs]
        if not all(p.is_file() and self.known(*x) for p, x in zip(paths, pairs, strict=True)):
            return None
        return [_load(path, self.pipe._execution_device) for path in paths]

    def _make(self, pairs: Sequence[Pair]) -> list[Clip]:
        requests = [replace(self.base, prompt=prompt, seed=seed) for prompt, seed in pairs]
        try:
            if len(pairs) not in self._warm:
                clips.warm(self.pipe, self.defaults, requests, 1)
                self._warm.add(len(pairs))
            made = clips.make(self.pipe, self.defaults, requests)
        except Exception as error:
            if len(pairs) == 1 or not is_out_of_memory(error):
                raise
            made = []
        if not made:  # out of memory: out of the except block, whose frames hold tensors
            clips.free()
            half = len(pairs) // 2
            return [*self._make(pairs[:half]), *self._make(pairs[half:])]
        for pair, clip, seen in zip(pairs, made, self.seen(pairs, made), strict=True):
            _save(self._path(pair), clip)
            facts = {"seconds": clip.seconds, "wall": clip.wall, **seen}
            facts |= {"flicker": quality.flicker(clip.frames), "together": len(pairs)}
            self.journal.add(f"dense #{pair[1]} {pair[0]}", facts)
        return made


def _save(path: Path, clip: Clip) -> None:
    latents = np.empty(0) if clip.latents is None else clip.latents.float().cpu().numpy()
    kept = {"frames": clip.frames.cpu().numpy(), "latents": latents}
    times = {"seconds": np.array(clip.seconds), "wall": np.array(clip.wall)}
    with atomic(path) as temporary:
        np.savez(temporary, allow_pickle=False, **kept, **times)


def _load(path: Path, device: torch.device) -> Clip:
    with np.load(path) as data:
        latents = torch.from_numpy(data["latents"]).to(device) if data["latents"].size else None
        frames = torch.from_numpy(data["frames"]).to(device)
        return Clip(frames, latents, float(data["seconds"]), float(data["wall"]))
