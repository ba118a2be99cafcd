"""How close an accelerated clip is to the dense one: PSNR and SSIM per frame, latents, flicker.

Clips are NumPy arrays or tensors; a tensor is measured on the device it lies on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

IDENTICAL_DB = 100.0
_WINDOW = 7
_LEVELS = 255.0
_TOGETHER = 8
Frames = np.ndarray | Tensor


class Closeness(TypedDict):
    """A Quality as JSON has it. latent_error: of the latents, where they are known."""

    psnr: list[float]
    ssim: list[float]
    flicker: tuple[float, float]
    psnr_mean: float
    ssim_mean: float
    latent_error: NotRequired[float]


@dataclass(frozen=True)
class Quality:
    """A clip measured against its reference.

    psnr, ssim: one value per frame; psnr in dB over 8-bit RGB, identical frames count as 100 dB.
    flicker: mean change from frame to frame, in grey levels, of (reference, clip).
    """

    psnr: list[float]
    ssim: list[float]
    flicker: tuple[float, float]

    @property
    def psnr_mean(self) -> float:
        return float(np.mean(self.psnr))

    @property
    def ssim_mean(self) -> float:
        return float(np.mean(self.ssim))

    def to_dict(self) -> Closeness:
        """JSON-able, the means included."""
        return {
            "psnr": self.psnr,
            "ssim": self.ssim,
            "flicker": self.flicker,
            "psnr_mean": self.psnr_mean,
            "ssim_mean": self.ssim_mean,
        }


def quality(reference: Frames, clip: Frames) -> Quality:
    """Compare two clips uint8 [T, H, W, 3]; ValueError when their shapes differ."""
    if reference.shape != clip.shape or reference.ndim != 4:
        raise ValueError(
            f"two clips [T, H, W, 3] are compared, not {tuple(reference.shape)}, "
            f"{tuple(clip.shape)}"
        )
    return Quality(
        psnr=_each(_psnr, reference, clip),
        ssim=_each(_ssim, reference, clip),
        flicker=(flicker(reference), flicker(clip)),
    )


def psnr(reference: Frames, frame: Frames) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures [H, W, 3], at most 100."""
    return _each(_psnr, reference[None], frame[None])[0]


def ssim(reference: Frames, frame: Frames) -> float:
    """Structural similarity (7 × 7 mean) of uint8 pictures [H, W, 3], sides ≥ 7; 1 if equal."""
    return _each(_ssim, reference[None], frame[None])[0]


def flicker(clip: Frames) -> float:
    """Mean absolute change between neighbouring frames of uint8 [T, H, W, 3]; 0 for a picture."""
    if len(clip) < 2:
        return 0.0
    levels = torch.as_tensor(clip).short()
    return float((levels[1:] - levels[:-1]).abs().float().mean())


def latent_error(reference: Tensor, latents: Tensor) -> float:
    """‖latents − reference‖ / ‖reference‖, computed in fp32."""
    reference, latents = reference.float(), latents.float()
    return float((latents - reference).norm() / reference.norm())


def _each(
    measure: Callable[[Tensor, Tensor], Tensor], reference: Frames, clip: Frames
) -> list[float]:
    """A measure of [T, 3, H, W] for each frame, a few frames at a time."""
    pairs = zip(*(torch.as_tensor(x).split(_TOGETHER) for x in (reference, clip)), strict=True)
    return torch.cat([measure(_planes(a), _planes(b)) for a, b in pairs]).tolist()


def _planes(frames: Tensor) -> Tensor:
    """[T, 3, H, W] float64, on the CPU where the device has none."""
    frames = frames.cpu() if frames.device.type == "mps" else frames
    return frames.permute(0, 3, 1, 2).double()


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    found = peak_signal_noise_ratio(b, a, data_range=_LEVELS, reduction="none", dim=(1, 2, 3))
    return found.clamp(max=IDENTICAL_DB)


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """In float64 by two passes of means: torchmetrics' convolution takes 13 s a clip on a CPU."""
    mean_a, mean_b = _mean(a), _mean(b)
    variances = _mean(a * a) - mean_a**2 + _mean(b * b) - mean_b**2
    covariance = _mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * _LEVELS) ** 2, (0.03 * _LEVELS) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


def _mean(x: Tensor) -> Tensor:
    """Over each window that lies inside the picture."""
    return avg_pool2d(avg_pool2d(x, (_WINDOW, 1), 1), (1, _WINDOW), 1)
