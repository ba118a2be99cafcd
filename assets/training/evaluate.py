"""Recompute every number of the model card, and the grid picture, in one command.

    python assets/training/evaluate.py --model assets/emoji --data data/emoji --out data/eval
    python assets/training/evaluate.py --limit 16 --prompts assets/prompts.txt     # on a CPU

Generated clips are kept in --out, so a run that was cut off goes on where it stopped. Colours and
frame stride are those in the model's training.json, else the archive's.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from clips import Clips, composite
from diffusers import WanPipeline
from emoji_set import caption
from PIL import Image
from torch import Tensor

from dit_accel.evaluate import recognition

GRID = 16


class Generator:
    """The stock pipeline with the model's own defaults, and a folder of clips made before."""

    def __init__(self, model: Path, out: Path, device: str, frames: int | None) -> None:
        self.pipe = WanPipeline.from_pretrained(model).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = json.loads((model / "generation.json").read_text())
        self.call.pop("fps")
        self.call["num_frames"] = frames or self.call["num_frames"]
        self.folder, self.seconds = out / "clips", []
        self.folder.mkdir(parents=True, exist_ok=True)

    def clip(self, prompt: str) -> Tensor:
        """[T, H, W, 3] uint8; the seed is a hash of the prompt."""
        seed = zlib.crc32(prompt.encode())
        file = self.folder / f"{seed:08x}-{self.call['num_frames']}.npy"
        if not file.exists():
            start = time.perf_counter()
            frames = self.pipe(
                prompt, generator=torch.Generator().manual_seed(seed), **self.call
            ).frames[0]
            self.seconds.append(time.perf_counter() - start)
            np.save(file, (frames * 255).round().astype(np.uint8))
        return torch.from_numpy(np.load(file))


def decibels(a: Tensor, b: Tensor) -> float:
    """PSNR of two uint8 clips."""
    error = (a.float() - b.float()).square().mean().clamp(min=1e-3)
    return float(10 * torch.log10(255**2 / error))


class References:
    """The real clip of every (emoji, colour), small, to find the nearest to a generation."""

    def __init__(self, clips: Clips, frames: int) -> None:
        self.clips, self.frames = clips, frames
        self.small = recognition.References.of(
            clips.rgba[:, :frames],
            clips.names,
            list(range(frames)),
            clips.colours,
            clips.rgba.shape[2] // 8,
        )

    def real(self, name: str, colour: str) -> Tensor:
        """The clip asked for, [T, H, W, 3] uint8."""
        number = self.clips.names.index(name)
        background = torch.tensor([self.clips.colours[colour]]).float()
        rgba = self.clips.rgba[number : number + 1, : self.frames].cpu()
        frames = (composite(rgba, background)[0] + 1) * 127.5
        return frames.round().byte().permute(1, 2, 3, 0)

    def nearest(self, clip: Tensor) -> tuple[str, str]:
        """Name and colour of the reference with the least squared difference."""
        return self.small.nearest(clip.to(self.small.rgba.device))


def choose_prompts(clips: Clips, count: int) -> dict[str, list[str]]:
    """`count` trained pairs, spread over the set, and `count` held-out pairs of different emoji."""
    colours = list(clips.colours)
    pairs = clips.trained_pairs()
    step = max(1, len(pairs) // count)
    trained = [caption(clips.names[n], colours[c]) for n, c in pairs[::step][:count]]
    every = max(1, len(clips.names) // count)
    held = [caption(clips.names[n], colours[clips.held_out[n]]) for n in range(len(clips.names))]
    return {"trained": trained, "held_out": held[::every][:count]}


def measure(prompts: list[str], generator: Generator, references: References) -> dict[str, float]:
    """Retrieval of emoji and colour, and dB to the clip asked for."""
    emoji = colour = 0
    values = []
    for prompt in prompts:
        clip = generator.clip(prompt)
        wanted = references.small.asked(prompt)
        if wanted is None:
            raise ValueError(f"Expected an emoji and a colour of the archive, got {prompt!r}.")
        found = references.nearest(clip)
        emoji, colour = emoji + (found[0] == wanted[0]), colour + (found[1] == wanted[1])
        values.append(decibels(clip, references.real(*wanted)))
        print(f"{prompt}: {values[-1]:.1f} dB, nearest {found}", flush=True)
    count = len(prompts)
    return {
        "prompts": count,
        "emoji_retrieved": emoji / count,
        "colour_retrieved": colour / count,
        "psnr_mean": float(np.mean(values)),
        "psnr_worst": min(values),
    }


@torch.no_grad()
def autoencoder(pipe: WanPipeline, references: References, count: int) -> dict[str, float]:
    """dB of whole clips through the stock (chunked) encoder and decoder."""
    clips, values = references.clips, []
    every = max(1, len(clips.names) // count)
    for number in range(0, len(clips.names), every)[:count]:
        real = references.real(
            clips.names[number], list(clips.colours)[number % len(clips.colours)]
        )
        video = (real.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(pipe.device)
        again = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mean).sample[0].clamp(-1, 1)
        values.append(decibels(((again + 1) * 127.5).round().permute(1, 2, 3, 0).cpu(), real))
    frames = int(real.shape[0])
    return {"clips": len(values), "frames": frames, "psnr_mean": float(np.mean(values)),
            "psnr_worst": min(values)}  # fmt: skip


def grid(clips: list[Tensor], file: Path, side: int = 144) -> None:
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
    parser.add_argument("--prompts", type=Path, help="file of prompts instead of chosen pairs")
    parser.add_argument("--limit", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--vae-clips", type=int, default=16)
    parser.add_argument("--frames", type=int, help="default: the model's")
    parser.add_argument("--grid", type=Path, help="write a picture of 16 generations here")
    parser.add_argument("--grid-prompts", type=Path, default=Path("assets/prompts.txt"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    facts = args.model / "training.json"
    known = json.loads(facts.read_text()) if facts.exists() else {}
    clips = Clips.load(args.data, args.device, stride=known.get("frame_stride", 1))
    clips = replace(clips, colours=known.get("colours", clips.colours))
    generator = Generator(args.model, args.out, args.device, args.frames)
    frames = generator.call["num_frames"]
    references = References(clips, frames)
    report = {"model": str(args.model), "frames": frames}
    whole = References(clips, clips.rgba.shape[1])
    report["autoencoder"] = autoencoder(generator.pipe, whole, args.vae_clips)
    if args.prompts:
        sets = {"given": args.prompts.read_text().splitlines()[: args.limit]}
    else:
        sets = choose_prompts(clips, args.limit)
    for kind, prompts in sets.items():
        report[kind] = measure(prompts, generator, references)
    if args.grid:
        prompts = args.grid_prompts.read_text().splitlines()[:GRID]
        grid([generator.clip(p) for p in prompts], args.grid)
    if generator.seconds:
        report["seconds_per_clip"] = float(np.median(generator.seconds))
    (args.out / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
