"""Mochi: visual tokens first, then the valid text tokens; one attention call per sample."""

from dit_accel.pipelines.base import Adapter
from dit_accel.pipelines.grids import latents

ADAPTER = Adapter(
    classes=("MochiTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=latents("last"),
)
