"""Clips of a model in training: a picture to look at, and small frames to be recognised."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import scene_set
import torch
import whole_clip
from diffusers import WanPipeline
from PIL import Image
from scene_flow import Flow
from torch.nn.functional import adaptive_avg_pool2d
from words import tokenize

SIDE, FRAMES = 96, (0, 8, 16, 24, 32)  # what is kept of every clip
PICTURED = 24


def prompts(side: int, count: int) -> list[str]:
    """Half of them trained on, half held out; always the same."""
    rng = random.Random(0)
    scenes = [scene_set.draw(rng, side, held=n % 2 == 1) for n in range(count)]
    return [s.text(articles=True) for s in scenes]


@torch.no_grad()
def show(
    flow: Flow,
    pipe: WanPipeline,
    side: int,
    frames: int,
    guidance: float,
    shift: float,
    count: int,
    out: Path,
    device: torch.device,
) -> None:
    """Write SIDExFRAMES-gGUIDANCE-sSHIFT.jpg and .npz: prompts, frames [P, 5, 96, 96, 3] uint8."""
    asked = prompts(side, count)
    ids, lengths = (x.to(device) for x in tokenize(pipe.tokenizer, asked))
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
        for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    shape = (pipe.vae.config.z_dim, 1 + (frames - 1) // 4, side // 8, side // 8)
    most = max(1, 40 * 2304 * 4 // (shape[1] * shape[2] * shape[3]))
    batch = max(n for n in range(1, most + 1) if count % n == 0)
    kept, tiles = [], []
    for start in range(0, count, batch):
        rows = slice(start, min(count, start + batch))
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(n))
             for n in range(count)[rows]]
        ).to(device)  # fmt: skip
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            latents = flow.sample(noise, ids[rows], lengths[rows], guidance, shift=shift)
            for one in latents.split(4):
                video = whole_clip.decode(pipe.vae, one * std + mean).float().clamp(-1, 1)
                video = ((video + 1) * 127.5).round()[:, :, [f for f in FRAMES if f < frames]]
                small = adaptive_avg_pool2d(video.transpose(1, 2).flatten(0, 1), SIDE)
                small = small.unflatten(0, (len(one), -1)).permute(0, 1, 3, 4, 2)
                kept.append(small.round().byte().cpu().numpy())
                tiles += [v[:, [0, -1]] for v in video.byte().cpu()][: PICTURED - len(tiles)]
    name = f"{side}x{frames}-g{guidance:g}-s{shift:g}"
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / f"{name}.npz", prompts=np.array(asked), frames=np.concatenate(kept))
    sheet = Image.new("RGB", (6 * 324, -(-len(tiles) // 6) * 162), "white")
    for number, tile in enumerate(tiles):
        for second in range(2):
            picture = Image.fromarray(tile[:, second].permute(1, 2, 0).numpy()).resize((160, 160))
            sheet.paste(picture, (number % 6 * 324 + 160 * second, number // 6 * 162))
    sheet.save(out / f"{name}.jpg", quality=85)
