"""Pictures of a clip while it forms, cheap enough to draw between two denoising steps."""

from __future__ import annotations

import base64
import io
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

BUDGET = 0.1


class Preview:
    """Draws what the latents promise, within `BUDGET` of the time that has passed.

    The clean clip is estimated from two neighbouring steps of a flow model. Its first frame goes
    through the decoder where that is cheap and the latents' statistics are in the decoder's config;
    elsewhere the three principal channels stand for red, green and blue.
    """

    def __init__(self, pipe: Any, ratio: float) -> None:
        self.pipe, self.ratio = pipe, ratio
        self.before: torch.Tensor | None = None
        self.began = time.perf_counter()
        self.spent = self.cost = 0.0

    def draw(self, step: int, latents: torch.Tensor | None) -> str | None:
        """A data: URI, or None when there is nothing to show or no time to draw it."""
        if latents is None:
            return None
        clean = self._clean(step, latents)
        self.before = latents
        began = time.perf_counter()
        if self.spent + self.cost > BUDGET * (began - self.began) and step > 2:
            return None
        picture = self._decoded(clean) if step > 1 else None
        if picture is None:
            picture = principal(_plane(clean, self.ratio))
        self.cost = time.perf_counter() - began
        self.spent += self.cost
        return data_uri(picture)

    def _clean(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """x₀ = x − σ·dx/dσ, the slope taken from the step before."""
        sigmas = getattr(self.pipe.scheduler, "sigmas", None)
        flow = "FlowMatch" in type(self.pipe.scheduler).__name__ or self.pipe.scheduler.config.get(
            "use_flow_sigmas", False
        )
        if self.before is None or sigmas is None or not flow or step >= len(sigmas):
            return latents
        now, then = float(sigmas[step]), float(sigmas[step - 1])
        return latents - now * (latents - self.before) / (now - then) if now != then else latents

    def _decoded(self, latents: torch.Tensor) -> np.ndarray | None:
        vae = getattr(self.pipe, "vae", None)
        mean, std = (_statistics(vae, name) for name in ("latents_mean", "latents_std"))
        if latents.ndim != 5 or mean is None or std is None or vae.device != latents.device:
            return None
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1).to(latents) for x in (mean, std))
        with torch.no_grad():
            frame = vae.decode((latents[:1, :, :1] * std + mean).to(vae.dtype)).sample
        return _pixels(frame[0, :, 0].float() / 2 + 0.5)


def _statistics(vae: Any, name: str) -> Any:
    return getattr(getattr(vae, "config", None), name, None)


def _plane(latents: torch.Tensor, ratio: float) -> torch.Tensor:
    """One latent picture [C, h, w] of [B, C, T, h, w], [B, C, h, w] or packed [B, N, C]."""
    if latents.ndim == 5:
        return latents[0, :, latents.shape[2] // 2]
    if latents.ndim == 4:
        return latents[0]
    count = latents.shape[1]
    sides = [h for h in range(1, count + 1) if count % h == 0]
    height = min(sides, key=lambda h: abs(h * h / count - ratio))
    return latents[0].T.reshape(-1, height, count // height)


def principal(plane: torch.Tensor) -> np.ndarray:
    """The three principal channels of [C, h, w] as uint8 [h, w, 3], signs made reproducible."""
    flat = plane.detach().float().cpu().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    axes = torch.linalg.svd(flat, full_matrices=False).U[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    colours = (axes.T @ flat).view(-1, *plane.shape[1:])
    colours = torch.nn.functional.pad(colours, (0, 0, 0, 0, 0, 3 - len(colours)))
    scale = colours.flatten(1).abs().amax(1).clamp(min=1e-6)
    return _pixels(colours / scale[:, None, None] / 2 + 0.5)


def _pixels(picture: torch.Tensor) -> np.ndarray:
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def data_uri(picture: np.ndarray, longest: int = 384) -> str:
    """A WebP of uint8 [H, W, 3], at most `longest` pixels on a side."""
    image = Image.fromarray(picture)
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
