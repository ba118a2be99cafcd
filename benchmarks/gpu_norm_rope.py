r"""The norm and rotary embedding of q and k: one operator, diffusers' own code, and that compiled.

    python benchmarks/gpu_norm_rope.py --out norm-rope.json [--sweep]
    python benchmarks/gpu_norm_rope.py --out /tmp/x.json --dry-run    in the interpreter

Milliseconds with a cold cache, in turns, and GB/s of what must be read and written; each output is
checked against float64. stock: what diffusers' WanAttnProcessor does between projection and
attention; copy: q and k copied. --sweep tries launches of the kernel.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_run import Run
from torch import Tensor, nn

from dit_accel.kernels.launch import find, padded, run
from dit_accel.kernels.norm_rope import reference
from dit_accel.kernels.norm_rope import triton as ours
from dit_accel.testing import assert_close

# tokens, heads, channels of a head
SHAPES = {
    "embedded-512x512x65": (17408, 5, 64),
    "wan1.3b-480p": (32760, 12, 128),
    "wan14b-720p": (75600, 40, 128),
}


class Inputs:
    """q, k [1, N, H · D] in bfloat16, their norms, cosines and sines [1, N, 1, D] in float32."""

    def __init__(self, r: Run, n: int, heads: int, d: int) -> None:
        self.heads, channels = heads, heads * d
        self.q, self.k = (
            torch.randn(1, n, channels, device=r.device, dtype=r.dtype) for _ in range(2)
        )
        self.norms = [nn.RMSNorm(channels, eps=1e-6).to(r.device, r.dtype) for _ in range(2)]
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1.0, 0.2)
        angles = torch.rand(1, n, 1, d // 2, device=r.device).mul(6.28).repeat_interleave(2, -1)
        self.turn = angles.cos(), angles.sin()

    @property
    def arguments(self) -> tuple[Any, ...]:
        weights = [norm.weight for norm in self.norms]
        return (self.q, self.k, *self.turn, self.heads, *weights, 1e-6)

    @property
    def bytes(self) -> int:
        """Of q and k, read and written, and of half of the cosines and sines."""
        return 4 * self.q.nbytes + self.turn[0].nbytes


def stock(x: Inputs) -> tuple[Tensor, Tensor]:
    """What diffusers 0.42 does, operation for operation."""
    out = []
    for y, norm in zip((x.q, x.k), x.norms, strict=True):
        y = norm(y).unflatten(2, (x.heads, -1))
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = x.turn[0][..., 0::2], x.turn[1][..., 1::2]
        z = torch.empty_like(y)
        z[..., 0::2] = a * cos - b * sin
        z[..., 1::2] = a * sin + b * cos
        out.append(z)
    return out[0], out[1]


def case(r: Run, shape: tuple[int, ...]) -> dict[str, Any]:
    x = Inputs(r, *shape)
    fns = {
        "ours": lambda: ours.norm_rope(*x.arguments),
        "stock": lambda: stock(x),
        "copy": lambda: (x.q.clone(), x.k.clone()),
    }
    if not r.dry:
        compiled = torch.compile(stock, dynamic=False)
        fns["stock, compiled"] = lambda: compiled(x)
    few = slice(0, 512)
    part = Inputs(r, min(512, shape[0]), *shape[1:])
    part.q, part.k, part.norms = x.q[:, few], x.k[:, few], x.norms
    part.turn = x.turn[0][:, few], x.turn[1][:, few]
    wide = reference.norm_rope(*part.arguments, dtype=torch.float64)
    same = reference.norm_rope(*part.arguments)
    errors = {}
    for name in fns.keys() - {"copy"}:
        made = [y[:, few] for y in fns[name]()]
        errors[name] = max(
            ((y.double() - w).norm() / w.norm()).item() for y, w in zip(made, wide, strict=True)
        )
        for y, w, s in zip(made, wide, same, strict=True) if name == "ours" else ():
            assert_close("norm_rope", y, w, s)
    equal = all(torch.equal(*pair) for pair in zip(fns["ours"](), fns["stock"](), strict=True))
    ms = r.in_turns(fns)
    gbps = {name: round(x.bytes / time / 1e6) for name, time in ms.items()}
    return {"shape": shape, "ms": ms, "gb_per_s": gbps, "error": errors, "bit_equal": equal,
            "peak_mib": {name: round(r.peak(fn) / 2**20) for name, fn in fns.items()}}  # fmt: skip


def sweep(r: Run, shape: tuple[int, ...]) -> dict[str, Any]:
    """Milliseconds of launches: (elements of a step, heads of a step, warps)."""
    x = Inputs(r, *shape)
    expected = stock(x)
    _, heads, d = shape
    row, width, found = find("norm_rope", 90, d, heads), padded(d), {}
    out = [torch.empty(1, shape[0], heads, d, device=r.device, dtype=r.dtype) for _ in range(2)]
    weights = tuple(norm.weight for norm in x.norms)
    asked = ours.arguments(x.q, x.k, *x.turn, *out, weights, 1e-6, row)
    widths = sorted({1, heads & -heads, padded(heads)} | {2, 4, 8} & set(range(heads)))
    for most, size, warps in product(widths, (512, 1024, 2048, 4096, 8192), (1, 2, 4, 8)):
        if most * width > size or size // (32 * warps) not in (4, 8, 16, 32, 64):
            continue
        some = {**asked, "HEADS": most, "ROWS": size // (most * width)}
        grid = (-(-shape[0] // some["ROWS"]), 1)
        fn = partial(run, ours._norm_rope_fwd_kernel, grid, some, replace(row, warps=warps))
        fn()
        torch.testing.assert_close(tuple(out), expected, atol=4e-2, rtol=2e-2)
        found[f"{size} elements, {most} heads, {warps} warps"] = r.ms(fn, 30)
    best = sorted(found.items(), key=lambda pair: pair[1])
    return {"shape": shape, "ms": dict(best)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--budget", type=float, default=200)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny")
    options = parser.parse_args()
    torch.manual_seed(0)
    r = Run(options.out, options.budget, options.dry_run)
    with torch.no_grad():
        for name, shape in SHAPES.items():
            shape = (40, 2, 64) if options.dry_run else shape
            if options.sweep:
                r.case(f"sweep {name}", lambda s=shape: sweep(r, s))
            r.case(name, lambda s=shape: case(r, s))


if __name__ == "__main__":
    main()
