"""How close an accelerated clip is to the dense one: PSNR and SSIM per frame, latents, flicker."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

IDENTICAL_DB = 100.0


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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, the means included."""
        return {**asdict(self), "psnr_mean": self.psnr_mean, "ssim_mean": self.ssim_mean}


def quality(reference: np.ndarray, clip: np.ndarray) -> Quality:
    """Compare two clips uint8 [T, H, W, 3]; ValueError when their shapes differ."""
    if reference.shape != clip.shape or reference.ndim != 4:
        raise ValueError(
            f"two clips [T, H, W, 3] are compared, not {reference.shape}, {clip.shape}"
        )
    pairs = list(zip(reference, clip, strict=True))
    return Quality(
        psnr=[psnr(a, b) for a, b in pairs],
        ssim=[ssim(a, b) for a, b in pairs],
        flicker=(flicker(reference), flicker(clip)),
    )


def psnr(reference: np.ndarray, frame: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures, at most 100."""
    if np.array_equal(reference, frame):
        return IDENTICAL_DB
    return min(IDENTICAL_DB, float(peak_signal_noise_ratio(reference, frame, data_range=255)))


def ssim(reference: np.ndarray, frame: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures [H, W, 3], 1 when equal; sides ≥ 7."""
    return float(structural_similarity(reference, frame, data_range=255, channel_axis=-1))


def flicker(clip: np.ndarray) -> float:
    """Mean absolute change between neighbouring frames of uint8 [T, H, W, 3]; 0 for a picture."""
    if len(clip) < 2:
        return 0.0
    return float(np.abs(np.diff(clip.astype(np.int16), axis=0)).mean())


def latent_error(reference: torch.Tensor, latents: torch.Tensor) -> float:
    """‖latents − reference‖ / ‖reference‖, computed in fp32."""
    reference, latents = reference.float(), latents.float()
    return float((latents - reference).norm() / reference.norm())
