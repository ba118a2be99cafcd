"""Which exact backend of dense attention is the fastest here, for the shapes of real models.

    python benchmarks/dense_backends.py --out dense.json

Each row is what `accelerate(pipe, dense="auto")` would choose for such a call, with the
milliseconds of all backends at hand and the reasons of those that were left out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from dit_accel.bench.shapes import DEFAULT_SHAPES, SHAPES
from dit_accel.machine import describe
from dit_accel.ops import backends

LARGE = ("wan1.3b-480p", "wan14b-720p", "cogvideox-5b", "flux-1024")


def row(name: str, device: str) -> dict:
    """The choice for one shape, of all exact backends that this device can use."""
    shape = SHAPES[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = (shape.batch, shape.n, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
    found = backends.fastest(backends.at_hand(q.device), q, k, v)
    work = 4e-9 * shape.batch * shape.heads * shape.n**2 * shape.head_dim
    tflops = {name: round(work / ms, 1) for name, ms in found.ms.items()}
    return {"shape": name, "size": list(size), **asdict(found), "tflops": tflops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="*", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = [x for x in LARGE if x in SHAPES] if device == "cuda" else DEFAULT_SHAPES["cpu"]
    rows = []
    for name in asked.shape or default:
        rows.append(row(name, device))
        print(json.dumps(rows[-1]), flush=True)
    if asked.out:
        data = {"machine": describe(device), "rows": rows}
        asked.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
