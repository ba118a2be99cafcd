"""What stands in for the parts of a pipeline that do not denoise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class Safe(nn.Module):
    """A guard that lets everything pass."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


class Processor:
    """What Qwen-Image 2.1 asks when it is made."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])
    image_processor = None

    def apply_chat_template(self, *args: Any, **options: Any) -> list[list[int]]:
        return [[0]]


class Encoded(SimpleNamespace):
    """What a VAE's `encode` returns: the distribution, by name or as the first of a tuple."""

    def __getitem__(self, index: int) -> Any:
        return (self.latent_dist,)[index]


class Vae(nn.Module):
    """Averages of 8 × 8 pixels as latents; as much of a VAE as pipelines ask of one."""

    def __init__(self, channels: int, video: bool) -> None:
        super().__init__()
        self.channels, self.video = channels, video
        self.config = SimpleNamespace(
            latent_channels=channels,
            z_dim=channels,
            block_out_channels=(1, 1, 1, 1),
            scaling_factor=1.0,
            shift_factor=0.0,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            scale_factor_spatial=8,
            scale_factor_temporal=4,
            temporal_compression_ratio=4,
            invert_scale_latents=False,
            spatial_compression_ratio=8,
            layers_per_block=1,
        )
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.temperal_downsample = self.temporal_downsample = [False, True, True]
        self.spatial_compression_ratio, self.temporal_compression_ratio = 8, 4
        self.bn, self.config.batch_norm_eps = nn.BatchNorm2d(4 * channels).eval(), 1e-5
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)

    dtype = property(lambda self: self.weight.dtype)
    device = property(lambda self: self.weight.device)

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        small = nn.functional.avg_pool2d(pixels.flatten(0, -4) if pixels.ndim > 4 else pixels, 8)
        if pixels.ndim == 5:
            frames = pixels.transpose(1, 2).flatten(0, 1)
            small = nn.functional.avg_pool2d(frames, 8).unflatten(0, (pixels.shape[0], -1))
            small = small.transpose(1, 2)[:, :, ::4]
        latents = small.mean(1, keepdim=True).repeat_interleave(self.channels, 1)
        found = SimpleNamespace(
            sample=lambda generator=None: latents, mode=lambda: latents, mean=latents
        )
        return Encoded(latent_dist=found, latents=latents)

    def decode(self, latents: torch.Tensor, return_dict: bool = True, **more: Any) -> Any:
        small = latents.mean(1, keepdim=True).repeat_interleave(3, 1)
        pixels = small.repeat_interleave(8, -1).repeat_interleave(8, -2)
        return SimpleNamespace(sample=pixels) if return_dict else (pixels,)


class AudioVae(Safe):
    """As much of LTX-2's VAE of sound as its pipelines ask of one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            sample_rate=16000, mel_hop_length=160, mel_bins=64, latent_channels=8
        )
        self.mel_compression_ratio = self.temporal_compression_ratio = 4
        self.latents_mean, self.latents_std = torch.zeros(128), torch.ones(128)


class Transforms:
    """As much of torchvision's transforms as the control net of Cosmos 2.5 asks for."""

    InterpolationMode = SimpleNamespace(NEAREST="nearest")
    functional = SimpleNamespace(
        resize=lambda pixels, size, interpolation: nn.functional.interpolate(
            pixels, size, mode=interpolation
        )
    )
