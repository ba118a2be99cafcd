"""Metrics against their definitions."""

import json
import math

import numpy as np
import pytest
import torch

from dit_accel.media import quality


def noise(seed: int, shape: tuple[int, ...] = (3, 16, 20, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_psnr_is_its_definition():
    a, b = noise(0)[0], noise(1)[0]
    mse = ((a.astype(float) - b.astype(float)) ** 2).mean()
    assert quality.psnr(a, b) == pytest.approx(10 * math.log10(255**2 / mse))


def test_ssim_is_its_definition_away_from_the_edges():
    a = np.full((16, 16, 3), 100, np.uint8)
    brighter = (2 * 100 * 110 + 2.55**2) / (100**2 + 110**2 + 2.55**2)
    assert quality.ssim(a, a + 10) == pytest.approx(brighter)


def test_ssim_is_the_mean_over_its_windows():
    a, b = noise(3)[0], (noise(3)[0] // 2 + noise(4)[0] // 3).astype(np.uint8)
    windows = [np.lib.stride_tricks.sliding_window_view(x / 255, (7, 7), (0, 1)) for x in (a, b)]
    x, y = (w.reshape(*w.shape[:3], 49) for w in windows)
    (mx, my), cov = (x.mean(-1), y.mean(-1)), (x * y).mean(-1) - x.mean(-1) * y.mean(-1)
    found = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
    found /= (mx**2 + my**2 + 1e-4) * (x.var(-1) + y.var(-1) + 9e-4)
    assert quality.ssim(a, b) == pytest.approx(found.mean())


def test_a_tensor_is_measured_as_an_array():
    a, b = noise(0), noise(1)
    assert quality.quality(torch.from_numpy(a), torch.from_numpy(b)) == quality.quality(a, b)


def test_one_grey_level_is_48_db():
    a = np.full((8, 8, 3), 100, np.uint8)
    assert quality.psnr(a, a + 1) == pytest.approx(48.13, abs=0.01)


def test_identical_clips_are_finite_json():
    near = quality.quality(noise(0), noise(0))
    assert near.psnr == [100.0] * 3
    assert near.ssim_mean == pytest.approx(1)
    assert json.loads(json.dumps(near.to_dict(), allow_nan=False))["psnr_mean"] == 100


def test_worse_is_lower():
    a = noise(0)
    small = np.clip(a.astype(int) + 4, 0, 255).astype(np.uint8)
    near, far = quality.quality(a, small), quality.quality(a, noise(2))
    assert near.psnr_mean > far.psnr_mean + 10
    assert near.ssim_mean > far.ssim_mean
    assert len(near.psnr) == len(near.ssim) == 3


def test_flicker():
    clip = np.zeros((4, 8, 8, 3), np.uint8)
    assert quality.flicker(clip) == 0
    clip[1::2] = 10
    assert quality.flicker(clip) == 10
    assert quality.flicker(clip[:1]) == 0


def test_latent_error_is_relative():
    reference = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert quality.latent_error(reference, reference) == 0
    assert quality.latent_error(reference, reference * 1.1) == pytest.approx(0.1, rel=1e-4)
    half = quality.latent_error(reference.bfloat16(), reference.bfloat16() * 2)
    assert half == pytest.approx(1, rel=1e-2)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="two clips"):
        quality.quality(noise(0), noise(0)[:2])
