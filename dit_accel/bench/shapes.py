"""The self-attention of known models: what the operators are timed on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The self-attention of one model: q, k and v are [batch, heads, n, head_dim]."""

    name: str
    batch: int
    heads: int
    n: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.batch, self.heads, self.n, self.head_dim) < 1:
            raise ValueError(f"the sizes of a shape are positive, unlike those of {self}")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan1.3b-480p", 1, 12, 32760, 128),
        Shape("wan14b-720p", 1, 40, 75600, 128),
        Shape("hunyuan-720p-129f", 1, 24, 119056, 128),
        Shape("cogvideox-5b", 1, 48, 17776, 64),
        Shape("ltx-512p-121f", 1, 32, 6144, 64),
        Shape("flux-1024", 1, 24, 4608, 128),
        Shape("flux-2048", 1, 24, 16896, 128),
        Shape("cpu-4k", 1, 4, 4096, 64),
        Shape("cpu-8k", 1, 4, 8192, 64),
        Shape("cpu-16k", 1, 4, 16384, 64),
    )
}


DEFAULT_SHAPES = {"cpu": ("cpu-4k", "cpu-8k", "cpu-16k"), "cuda": ("wan1.3b-480p", "flux-1024")}
