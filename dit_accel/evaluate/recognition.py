"""Is what was asked for what is seen? The nearest of all training clips to a generated one.

The embedded model's training clips lie beside it as a few small frames each
(assets/emoji-clips.safetensors, written by assets/training/references.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dit_accel.generation.loading import EMBEDDED

FILE = EMBEDDED.parent / "emoji-clips.safetensors"
FACTS = "training.json"
_KEY = "dit_accel.references"
Colours = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class References:
    """Small clips on a clear ground, and the colours that may lie behind them.

    Args:
        rgba: [N, F, h, w, 4] uint8, colours multiplied by alpha.
        names: of the N clips. frames: which frames of a whole clip the F are, rising from 0.
        colours: name → RGB in [0, 255].
    """

    rgba: Tensor
    names: list[str]
    frames: list[int]
    colours: Colours

    @classmethod
    def of(
        cls, rgba: Tensor, names: list[str], frames: list[int], colours: Colours, side: int
    ) -> References:
        """From these frames of whole clips [N, F, H, W, 4] uint8, made `side` × `side`."""
        tiny = [small(clip, side).permute(0, 2, 3, 1).round().byte() for clip in rgba]
        return cls(torch.stack(tiny), names, frames, colours)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        facts = {"names": self.names, "frames": self.frames, "colours": self.colours}
        save_file({"rgba": self.rgba.cpu().contiguous()}, path, {_KEY: json.dumps(facts)})

    @classmethod
    def load(cls, path: Path, colours: Colours | None = None) -> References:
        """Read what `save` wrote; `colours` instead of the file's. ValueError for another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})[_KEY])
                rgba = file.get_tensor("rgba")
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} does not hold the small training clips: {error}") from None
        known = {name: tuple(rgb) for name, rgb in (colours or facts["colours"]).items()}
        return cls(rgba, facts["names"], facts["frames"], known)

    def asked(self, prompt: str) -> tuple[str, str] | None:
        """(name, colour) of "<name> on a <colour> background"; None for any other prompt."""
        name, _, rest = prompt.partition(" on a ")
        colour = rest.removesuffix(" background")
        return (name, colour) if name in self.names and colour in self.colours else None

    def nearest(self, clip: Tensor, stride: int = 1) -> tuple[str, str]:
        """Name and colour of the reference with the least squared difference.

        clip: uint8 [T, H, W, 3], whose frame i is frame i·stride of a whole training clip.
        """
        places = [
            n for n, f in enumerate(self.frames) if f % stride == 0 and f // stride < len(clip)
        ]
        seen = small(clip[[self.frames[n] // stride for n in places]], self.rgba.shape[2])
        rgba = self._planes.to(seen.device)[:, places]
        clear, best = 1 - rgba[:, :, 3:] / 255, (float("inf"), "", "")
        for colour, rgb in self.colours.items():
            ground = torch.tensor(rgb, device=seen.device).float()[:, None, None]
            error = (rgba[:, :, :3] + clear * ground - seen).square().flatten(1).mean(1)
            value, number = error.min(0)
            best = min(best, (float(value), self.names[int(number)], colour))
        return best[1], best[2]

    def at(self, frame: int) -> Tensor:
        """All emoji as they look nearest to this frame, [N, 4, h, w] in [0, 1]."""
        near = min(range(len(self.frames)), key=lambda n: abs(self.frames[n] - frame))
        return self._planes[:, near] / 255

    @cached_property
    def _planes(self) -> Tensor:
        """[N, F, 4, h, w] float32."""
        return self.rgba.permute(0, 1, 4, 2, 3).float()


@dataclass(frozen=True)
class Recogniser:
    """References as one model was trained on them: it may know other colours, and fewer frames."""

    references: References
    stride: int

    @classmethod
    def of(cls, model: str | Path | None, device: torch.device | str = "cpu") -> Recogniser | str:
        """For the embedded model; for any other, and without the file, why there is none."""
        if model is not None and Path(model).resolve() != EMBEDDED.resolve():
            return "the training clips of this model are not at hand"
        if not FILE.is_file():
            return f"{FILE} is missing: assets/training/references.py writes it"
        facts = EMBEDDED / FACTS
        known = json.loads(facts.read_text("utf-8")) if facts.is_file() else {}
        found = References.load(FILE, known.get("colours"))
        placed = References(found.rgba.to(device), found.names, found.frames, found.colours)
        return cls(placed, known.get("frame_stride", 1))

    def judge(self, prompts: Sequence[str], clips: Sequence[Tensor]) -> list[dict[str, bool]]:
        """For each clip whether its emoji and its colour are the nearest; {} where the prompt asks
        for no known pair."""
        return [self._one(prompt, clip) for prompt, clip in zip(prompts, clips, strict=True)]

    def _one(self, prompt: str, clip: Tensor) -> dict[str, bool]:
        asked = self.references.asked(prompt)
        if asked is None:
            return {}
        found = self.references.nearest(clip, self.stride)
        return {"emoji": found[0] == asked[0], "colour": found[1] == asked[1]}


def small(frames: Tensor, side: int) -> Tensor:
    """Area means: uint8 [T, H, W, C] → float [T, C, side, side]."""
    return adaptive_avg_pool2d(frames.permute(0, 3, 1, 2).float(), side)
