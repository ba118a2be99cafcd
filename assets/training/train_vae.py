"""Stage 1: the autoencoder, on crops and whole clips with named and random backgrounds."""

from __future__ import annotations

import random
import time
from dataclasses import asdict
from pathlib import Path

import torch
import whole_clip
from clips import Clips, composite
from diffusers import AutoencoderKLWan
from models import Sizes, build_vae
from muon import optimizers
from run_state import (
    EVERY_SECONDS,
    Average,
    Clock,
    Log,
    Progress,
    learning_rate,
    load,
    restart,
    save,
)
from torch import Tensor

# (frames, pixels, clips in a batch): equal work; most steps are crops, all lengths occur
CROPS = [(17, 128, 32), (33, 128, 16), (65, 128, 8)]
WHOLE = [(17, 256, 8), (33, 256, 4), (65, 256, 2)]


def draw(clips: Clips, shape: tuple[int, int, int]) -> Tensor:
    """A batch [B, 3, T, P, P]: random clips, starts and places; 30 % random backgrounds."""
    frames, pixels, count = shape
    device, (_, total, side, _, _) = clips.rgba.device, clips.rgba.shape
    parts = []
    for _ in range(count):
        clip = clips.rgba[random.randrange(len(clips.names))]
        start = random.randint(0, total - frames)
        y, x = random.randint(0, side - pixels), random.randint(0, side - pixels)
        parts.append(clip[start : start + frames, y : y + pixels, x : x + pixels])
    palette = clips.palette()
    named = palette[torch.randint(len(palette), (count,), device=device)]
    anything = torch.rand(count, 3, device=device) * 255
    backgrounds = torch.where(torch.rand(count, 1, device=device) < 0.3, anything, named)
    return composite(torch.stack(parts), backgrounds)


def loss_of(vae: AutoencoderKLWan, video: Tensor, act: whole_clip.Activation) -> Tensor:
    """L1 + 2·L2 + 0.25·L1 of the spatial gradient + 5e-4·KL, all means over elements."""
    mean, logvar = whole_clip.encode(vae, video, act).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    error = whole_clip.decode(vae, latents.to(video.dtype), act).float() - video.float()
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.25 * gradient + 5e-4 * kl


def _channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for p in vae.parameters():
        if p.dim() in formats:
            p.data = p.data.contiguous(memory_format=formats[p.dim()])
    return vae


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLWan, clips: Clips, act: whole_clip.Activation, draws: int = 64
) -> dict[str, list]:
    """Per-channel mean and standard deviation of the latents of whole clips."""
    latents = []
    for _ in range(draws):
        shape = (clips.rgba.shape[1], clips.rgba.shape[2], 1)
        with torch.autocast("cuda", torch.bfloat16, enabled=clips.rgba.is_cuda):
            mean = whole_clip.encode(vae, draw(clips, shape), act).float().chunk(2, dim=1)[0]
        latents.append(mean.transpose(0, 1).flatten(1))
    flat = torch.cat(latents, dim=1)
    return {"latents_mean": flat.mean(1).tolist(), "latents_std": flat.std(1).tolist()}


@torch.no_grad()
def whole_psnr(
    vae: AutoencoderKLWan, clips: Clips, act: whole_clip.Activation, count: int = 16
) -> float:
    """Mean dB over whole clips, each through encoder and decoder at once."""
    values = []
    for _ in range(count):
        video = draw(clips, (clips.rgba.shape[1], clips.rgba.shape[2], 1))
        with torch.autocast("cuda", torch.bfloat16, enabled=video.is_cuda):
            mean = whole_clip.encode(vae, video, act).chunk(2, dim=1)[0]
            error = whole_clip.decode(vae, mean, act).float().clamp(-1, 1) - video
        values.append(10 * torch.log10(4 / error.square().mean()))
    return float(torch.stack(values).mean())


def _pick(clips: Clips, share: float, step: int) -> tuple[int, int, int]:
    frames, side = clips.rgba.shape[1], clips.rgba.shape[2]
    shapes = WHOLE if share > 0.6 and step % 2 else CROPS
    t, p, b = shapes[random.choices(range(len(shapes)), [4, 2, 2])[0]]
    return (min(t, frames), min(p, side), b if clips.rgba.is_cuda else 2)


def train(
    clips: Clips,
    out: Path,
    sizes: Sizes,
    minutes: float,
    total_minutes: float,
    resume: bool,
    max_steps: int | None = None,
    compile_parts: bool = True,
) -> Progress:
    """Train for `minutes`, saving `out/vae` every minute and at the end with its statistics."""
    device, progress = clips.rgba.device, Progress()
    vae = _channels_last(build_vae(sizes).to(device))
    average = Average({"vae": vae}, decay=0.998)
    if resume:
        tensors, progress, _ = load(out / "vae")
        average.load(tensors)
    restart(progress)
    opts = optimizers(vae.named_parameters(), 1e-3, 5e-4, keep=("conv_in.", "conv_out."))
    base = [group["lr"] for o in opts for group in o.param_groups]
    act = whole_clip.norm_silu
    act = torch.compile(act, dynamic=True) if compile_parts else act
    clock, log = Clock(progress, minutes, total_minutes), Log(out / "vae.jsonl", 20)
    saved, on_gpu = time.monotonic(), device.type == "cuda"
    while clock.running(max_steps):
        rate = learning_rate(clock.share(), progress.step - clock.first_step, 50, 0.3)
        for lr, group in zip(base, (g for o in opts for g in o.param_groups), strict=True):
            group["lr"] = lr * rate
        shape = _pick(clips, clock.share(), progress.step)
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = loss_of(vae, draw(clips, shape), act)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        progress.step += 1
        average.update(progress.step)
        log.add(progress, loss, lr=rate)
        if time.monotonic() - saved > EVERY_SECONDS:
            save(out / "vae", average.values, progress, {"sizes": asdict(sizes)})
            saved = time.monotonic()
    with torch.no_grad():
        for name, p in average.live.items():
            p.copy_(average.values[name].to(torch.bfloat16))
    extra = {
        "sizes": asdict(sizes),
        **latent_statistics(vae, clips, act),
        "psnr": whole_psnr(vae, clips, act),
    }
    save(out / "vae", average.values, progress, extra)
    print(f"autoencoder: {extra['psnr']:.2f} dB over whole clips after {progress.step} steps")
    return progress
