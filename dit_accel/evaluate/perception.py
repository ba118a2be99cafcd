"""LPIPS (arXiv 1801.03924) where torchmetrics and AlexNet's weights are on this machine already."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

_ALEXNET = "alexnet-owt-7be5be79.pth"
_AT_ONCE = 16
Distance = Callable[[Tensor, Tensor], float]


def find(device: torch.device | str) -> Distance | str:
    """Mean LPIPS of two clips uint8 [T, H, W, 3] as a function, or why it cannot be had.

    Nothing is downloaded.
    """
    for name in ("torchmetrics", "torchvision"):
        if find_spec(name) is None:
            return f"{name} is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET
    if not weights.is_file():
        return f"AlexNet's weights are not at {weights}, and nothing is downloaded unasked"
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    # the function of that name reads the weights anew in every call
    network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    def distance(reference: Tensor, clip: Tensor) -> float:
        network.reset()
        for a, b in zip(reference.split(_AT_ONCE), clip.split(_AT_ONCE), strict=True):
            x, y = (z.to(device).permute(0, 3, 1, 2).float() / 255 for z in (a, b))
            network.update(x, y)
        return float(network.compute())

    return distance
