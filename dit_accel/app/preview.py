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
    """Draws the first frame of what the latents promise.

    The clean clip is estimated from two neighbouring steps of a flow model. It goes through the
    decoder as long as that takes `BUDGET` of the time that has passed; in between a linear map from
    latent channels to colours, fitted to what was decoded before, draws it in no time. A model
    that has decoded nothing yet shows its three principal channels.
    """

    def __init__(self, pipe: Any, ratio: float, colours: torch.Tensor | None = None) -> None:
        self.pipe, self.ratio, self.colours = pipe, ratio, colours
        self.before: torch.Tensor | None = None
        self.began = time.perf_counter()
        self.spent = self.cost = 0.0

    def draw(self, step: int, latents: torch.Tensor | None) -> str | None:
        """A data: URI, or None for a pipeline that shows no latents."""
        if latents is None:
            return None
        clean = self._clean(step, latents)
        self.before = latents
        picture = self._decoded(clean) if step > 1 and self._affordable() else None
        if picture is not None and self.colours is None:
            self.colours = fit_colours(clean, picture, self.ratio)
        if picture is None:
            plane = _plane(clean, self.ratio)
            picture = principal(plane) if self.colours is None else linear(plane, self.colours)
        return data_uri(picture)

    def _affordable(self) -> bool:
        if not self.cost:
            return self.colours is None  # the first decoding tells what one costs
        return self.spent + self.cost <= BUDGET * (time.perf_counter() - self.began)

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
        vae: Any = getattr(self.pipe, "vae", None)
        mean, std = (_statistics(vae, name) for name in ("latents_mean", "latents_std"))
        if latents.ndim != 5 or mean is None or std is None or vae.device != latents.device:
            return None
        began = time.perf_counter()
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1).to(latents) for x in (mean, std))
        with torch.no_grad():
            frame = vae.decode((latents[:1, :, :1] * std + mean).to(vae.dtype)).sample
        picture = _pixels(frame[0, :, 0].float() / 2 + 0.5)
        self.cost = time.perf_counter() - began
        self.spent += self.cost
        return picture


def _statistics(vae: Any, name: str) -> Any:
    return getattr(getattr(vae, "config", None), name, None)


def _plane(latents: torch.Tensor, ratio: float) -> torch.Tensor:
    """One latent picture [C, h, w] of [B, C, T, h, w], [B, C, h, w] or packed [B, N, C]."""
    if latents.ndim == 5:
        return latents[0, :, 0]
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


def fit_colours(latents: torch.Tensor, frame: np.ndarray, ratio: float) -> torch.Tensor:
    """The map [C + 1, 3] from a latent frame to the colours of `frame`, uint8 [H, W, 3]."""
    plane = _plane(latents, ratio).detach().float().cpu()
    small = Image.fromarray(frame).resize((plane.shape[2], plane.shape[1]), Image.Resampling.BOX)
    target = torch.from_numpy(np.array(small)).float().div(255).flatten(0, 1)
    x = _with_ones(plane)
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1])
    return torch.linalg.solve(x.T @ x + ridge, x.T @ target)


def linear(plane: torch.Tensor, colours: torch.Tensor) -> np.ndarray:
    """[C, h, w] through a map of `fit_colours`, as uint8 [h, w, 3]."""
    flat = _with_ones(plane.detach().float().cpu()) @ colours
    return _pixels(flat.T.reshape(3, *plane.shape[1:]))


def _with_ones(plane: torch.Tensor) -> torch.Tensor:
    flat = plane.flatten(1).T
    return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)


def _pixels(picture: torch.Tensor) -> np.ndarray:
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def data_uri(picture: np.ndarray, longest: int = 384) -> str:
    """A WebP of uint8 [H, W, 3], at most `longest` pixels on a side."""
    image = Image.fromarray(picture)
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
