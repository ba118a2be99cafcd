"""How close an accelerated clip is to the dense one: PSNR and SSIM per frame, latents, flicker.

Clips are NumPy arrays or tensors; a tensor is measured on the device it lies on, by torchmetrics.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IDENTICAL_DB = 100.0
_WINDOW = 7
_LEVELS = 255.0
Frames = np.ndarray | Tensor


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


def quality(reference: Frames, clip: Frames) -> Quality:
    """Compare two clips uint8 [T, H, W, 3]; ValueError when their shapes differ."""
    if reference.shape != clip.shape or reference.ndim != 4:
        raise ValueError(
            f"two clips [T, H, W, 3] are compared, not {tuple(reference.shape)}, "
            f"{tuple(clip.shape)}"
        )
    return Quality(
        psnr=_psnr(_planes(reference), _planes(clip)).tolist(),
        ssim=_ssim(_planes(reference), _planes(clip)).tolist(),
        flicker=(flicker(reference), flicker(clip)),
    )


def psnr(reference: Frames, frame: Frames) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures [H, W, 3], at most 100."""
    return float(_psnr(_planes(reference[None]), _planes(frame[None])))


def ssim(reference: Frames, frame: Frames) -> float:
    """Structural similarity (7 × 7 mean) of uint8 pictures [H, W, 3], sides ≥ 7; 1 if equal."""
    return float(_ssim(_planes(reference[None]), _planes(frame[None])))


def flicker(clip: Frames) -> float:
    """Mean absolute change between neighbouring frames of uint8 [T, H, W, 3]; 0 for a picture."""
    if len(clip) < 2:
        return 0.0
    planes = _planes(clip)
    return float((planes[1:] - planes[:-1]).abs().mean())


def latent_error(reference: Tensor, latents: Tensor) -> float:
    """‖latents − reference‖ / ‖reference‖, computed in fp32."""
    reference, latents = reference.float(), latents.float()
    return float((latents - reference).norm() / reference.norm())


def _planes(clip: Frames) -> Tensor:
    """[T, 3, H, W] float64, on the CPU where the device has none."""
    clip = torch.as_tensor(clip)
    clip = clip.cpu() if clip.device.type == "mps" else clip
    return clip.permute(0, 3, 1, 2).double()


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    options = {"data_range": _LEVELS, "reduction": "none", "dim": (1, 2, 3)}
    return peak_signal_noise_ratio(b, a, **options).clamp(max=IDENTICAL_DB)


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    window = {"gaussian_kernel": False, "kernel_size": _WINDOW}
    return structural_similarity_index_measure(
        b, a, data_range=_LEVELS, reduction="none", **window
    ).reshape(-1)
