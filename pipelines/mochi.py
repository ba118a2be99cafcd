"""Mochi: visual tokens first, then the valid text tokens; one attention call per sample."""

from dit_accel.pipelines.base import Adapter, SpanSite
from dit_accel.pipelines.grids import latents

ADAPTER = Adapter(
    classes=("MochiTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=latents("last"),
    # image_rotary_emb: cosines and sines [N, H, D / 2]
    span=SpanSite(
        ("transformer_blocks",),
        "hidden_states",
        (("image_rotary_emb", 0, 3),),
        ("attn1", "ff"),
        text="encoder_hidden_states",
    ),
)
