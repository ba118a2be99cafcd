"""diffusers' Wan autoencoder over a whole clip at once, with the weights of the stock module.

The stock module walks through a clip in chunks of four frames with a cache. Every convolution is
causal, so one pass over all frames gives the same numbers and is what training needs; only the two
resampling layers treat the first frame apart (arXiv 2503.20314).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[Tensor, Tensor], Tensor]


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over the channels of [B, C, T, H, W], times gamma [C, 1, 1, 1], then SiLU."""
    normal = functional.normalize(x.float(), dim=1) * (x.shape[1] ** 0.5 * gamma)
    return functional.silu(normal).to(x.dtype)


def _spatial(layer: WanResample, x: Tensor) -> Tensor:
    frames = x.shape[2]
    y = layer.resample(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (-1, frames)).transpose(1, 2)


def _down(layer: WanResample, x: Tensor) -> Tensor:
    x = _spatial(layer, x)
    if layer.mode == "downsample2d" or x.shape[2] == 1:
        return x
    return torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)


def _up(layer: WanResample, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        # [B, 2C, T, H, W] -> two frames out of every one
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    return _spatial(layer, x)


def _residual(block: WanResidualBlock, x: Tensor, act: Activation) -> Tensor:
    y = block.conv1(act(x, block.norm1.gamma))
    return block.conv_shortcut(x) + block.conv2(act(y, block.norm2.gamma))


def _middle(block: nn.Module, x: Tensor, act: Activation) -> Tensor:
    x = _residual(block.resnets[0], x, act)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(resnet, attention(x), act)
    return x


def encode(vae: AutoencoderKLWan, video: Tensor, act: Activation = norm_silu) -> Tensor:
    """Mean and log-variance [B, 2Z, 1+(T-1)/4, h, w] of video [B, 3, T, H, W] in [-1, 1]."""
    if (video.shape[2] - 1) % 4:
        raise ValueError(f"Expected 4k + 1 frames, got {video.shape[2]}; cut the clip.")
    encoder = vae.encoder
    x = encoder.conv_in(patchify(video, vae.config.patch_size))
    for layer in encoder.down_blocks:
        is_resample = isinstance(layer, WanResample)
        x = _down(layer, x) if is_resample else _residual(layer, x, act)
    x = _middle(encoder.mid_block, x, act)
    return vae.quant_conv(encoder.conv_out(act(x, encoder.norm_out.gamma)))


def decode(vae: AutoencoderKLWan, latents: Tensor, act: Activation = norm_silu) -> Tensor:
    """Video [B, 3, 4(t-1)+1, H, W] of latents [B, Z, t, h, w]; not clamped."""
    decoder = vae.decoder
    x = _middle(decoder.mid_block, decoder.conv_in(vae.post_quant_conv(latents)), act)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x, act)
        for layer in block.upsamplers or []:
            x = _up(layer, x)
    x = decoder.conv_out(act(x, decoder.norm_out.gamma))
    return unpatchify(x, vae.config.patch_size)
