"""Recompute every number of the model card, and the grid picture, in one command.

    python assets/training/evaluate.py --model assets/emoji --data data/emoji --out data/eval
    python assets/training/evaluate.py --prompts assets/prompts.txt --vae-clips 4   # on a CPU

Generated clips are kept in --out, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from clips import composite, decode
from diffusers import WanPipeline
from emoji_set import caption
from PIL import Image
from torch import Tensor

from dit_accel.evaluate.recognition import FILE, References

GRID = 16


class Generator:
    """The stock pipeline with the model's own defaults, and a folder of clips made before.

    On a GPU its products run in bfloat16.
    """

    def __init__(self, model: Path, out: Path, device: str, frames: int | None) -> None:
        self.pipe = WanPipeline.from_pretrained(model).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = json.loads((model / "generation.json").read_text())
        self.call.pop("fps")
        self.call["num_frames"] = frames or self.call["num_frames"]
        self.folder, self.seconds = out / "clips", []
        self.on_gpu = self.pipe.device.type == "cuda"
        self.folder.mkdir(parents=True, exist_ok=True)

    def clip(self, prompt: str) -> Tensor:
        """[T, H, W, 3] uint8; the seed is a hash of the prompt."""
        self.make([prompt])
        return torch.from_numpy(np.load(self._file(prompt)))

    def make(self, prompts: list[str], batch: int = 1) -> None:
        """Generate those not made before, `batch` in a call; a clip's noise is its own."""
        missing = [p for p in dict.fromkeys(prompts) if not self._file(p).exists()]
        for start in range(0, len(missing), batch):
            group = missing[start : start + batch]
            began = time.perf_counter()
            noise = [torch.Generator().manual_seed(_seed(p)) for p in group]
            negative = {"negative_prompt": [self.call["negative_prompt"]] * len(group)}
            with torch.autocast(self.pipe.device.type, torch.bfloat16, enabled=self.on_gpu):
                clips = self.pipe(group, generator=noise, **self.call | negative).frames
            self.seconds.append((time.perf_counter() - began) / len(group))
            for prompt, frames in zip(group, clips, strict=True):
                np.save(self._file(prompt), (frames * 255).round().astype(np.uint8))
            print(f"{start + len(group)} of {len(missing)} clips generated", flush=True)

    def _file(self, prompt: str) -> Path:
        return self.folder / f"{_seed(prompt):08x}-{self.call['num_frames']}.npy"


def _seed(prompt: str) -> int:
    return zlib.crc32(prompt.encode())


def decibels(a: Tensor, b: Tensor) -> float:
    """PSNR of two uint8 clips."""
    error = (a.float() - b.float()).square().mean().clamp(min=1e-3)
    return float(10 * torch.log10(255**2 / error))


class Archive:
    """The training archive, read one clip at a time."""

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "captions.json").read_text())
        self.folder, self.colours = folder, manifest["colours"]
        self.clips = {clip["name"]: clip for clip in manifest["clips"]}

    def real(self, name: str, colour: str) -> Tensor:
        """The whole clip of a pair, [T, H, W, 3] uint8."""
        rgba = torch.from_numpy(decode(self.folder / self.clips[name]["file"]))
        background = torch.tensor([self.colours[colour]]).float()
        frames = (composite(rgba[None], background)[0] + 1) * 127.5
        return frames.round().byte().permute(1, 2, 3, 0)

    def is_held_out(self, prompt: str) -> bool:
        """True for a pair that was never trained on."""
        return prompt in {caption(n, c["held_out"]) for n, c in self.clips.items()}

    def choose(self, count: int) -> list[str]:
        """`count` trained pairs, spread over the set, and `count` held-out pairs of different
        emoji."""
        pairs = {
            held: [
                caption(n, colour)
                for n, c in self.clips.items()
                for colour in self.colours
                if (colour == c["held_out"]) == held
            ]
            for held in (False, True)
        }
        return [p for kind in pairs.values() for p in kind[:: max(1, len(kind) // count)][:count]]


def measure(
    prompts: list[str], generator: Generator, archive: Archive, references: References
) -> dict[str, float]:
    """Retrieval of emoji and colour, and dB to the clip asked for."""

    def one(prompt: str) -> tuple[bool, bool, float]:
        clip, wanted = generator.clip(prompt), references.asked(prompt)
        if wanted is None:
            raise ValueError(f"Expected an emoji and a colour of the archive, got {prompt!r}.")
        found = references.nearest(clip)
        value = decibels(clip, archive.real(*wanted)[: len(clip)])
        print(f"{prompt}: {value:.1f} dB, nearest {found}", flush=True)
        return found[0] == wanted[0], found[1] == wanted[1], value

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        emoji, colour, values = zip(*pool.map(one, prompts), strict=True)
    count = len(prompts)
    return {
        "prompts": count,
        "emoji_retrieved": sum(emoji) / count,
        "colour_retrieved": sum(colour) / count,
        "psnr_mean": float(np.mean(values)),
        "psnr_worst": min(values),
    }


@torch.no_grad()
def autoencoder(pipe: WanPipeline, archive: Archive, count: int) -> dict[str, float]:
    """dB of whole clips through the stock (chunked) encoder and decoder."""
    names, colours, values = list(archive.clips), list(archive.colours), []
    every = max(1, len(names) // count)
    for number in range(0, len(names), every)[:count]:
        real = archive.real(names[number], colours[number % len(colours)])
        video = (real.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(pipe.device)
        again = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mean).sample[0].clamp(-1, 1)
        values.append(decibels(((again + 1) * 127.5).round().permute(1, 2, 3, 0).cpu(), real))
    frames = int(real.shape[0])
    return {"clips": len(values), "frames": frames, "psnr_mean": float(np.mean(values)),
            "psnr_worst": min(values)}  # fmt: skip


def grid(clips: list[Tensor], file: Path, side: int = 160) -> None:
    """The middle frames, four in a row, as a PNG."""
    tiles = [Image.fromarray(c[len(c) // 2].numpy()).resize((side, side), 1) for c in clips]
    sheet = Image.new("RGB", (4 * side, (len(tiles) + 3) // 4 * side), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % 4 * side, number // 4 * side))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("assets/emoji"))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("data/eval"))
    parser.add_argument("--references", type=Path, default=FILE, help="of references.py")
    parser.add_argument("--prompts", type=Path, help="file of prompts instead of chosen pairs")
    parser.add_argument("--limit", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--vae-clips", type=int, default=16)
    parser.add_argument("--frames", type=int, help="default: the model's")
    parser.add_argument("--batch", type=int, default=1, help="clips in one call")
    parser.add_argument("--grid", type=Path, help="write a picture of 16 generations here")
    parser.add_argument("--grid-prompts", type=Path, default=Path("assets/prompts.txt"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    archive, references = Archive(args.data), References.load(args.references)
    generator = Generator(args.model, args.out, args.device, args.frames)
    chosen = args.prompts.read_text().splitlines() if args.prompts else archive.choose(args.limit)
    generator.make(chosen, args.batch)
    report = {"model": str(args.model), "frames": generator.call["num_frames"]}
    for kind, held in (("trained", False), ("held_out", True)):
        prompts = [p for p in chosen if archive.is_held_out(p) == held][: args.limit]
        if prompts:
            report[kind] = measure(prompts, generator, archive, references)
    if args.grid:
        prompts = args.grid_prompts.read_text().splitlines()[:GRID]
        grid([generator.clip(p) for p in prompts], args.grid)
    if args.vae_clips:
        report["autoencoder"] = autoencoder(generator.pipe, archive, args.vae_clips)
    if generator.seconds:
        report["seconds_per_clip"] = float(np.median(generator.seconds))
    (args.out / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
