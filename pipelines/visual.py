"""Families whose self-attention sees visual tokens only; text comes in by cross-attention."""

from dataclasses import replace

from dit_accel.pipelines.base import Adapter, Geometry, SpanSite
from dit_accel.pipelines.grids import grid_of, latents

# image_rotary_emb: tables of angles, then each token's row in them (three of [1, N])
ADAPTER = Adapter(
    classes=("AllegroTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=latents(),
    span=SpanSite(
        ("transformer_blocks",),
        rows=(("image_rotary_emb.1", 1, 2), ("attention_mask", 2, 3)),
        probes=("attn1", "ff"),
    ),
)
# image_rotary_emb: cosines and sines [N, D]; the time embeddings are per token in image to video
COSMOS = replace(
    ADAPTER,
    classes=("CosmosTransformer3DModel",),
    span=SpanSite(
        ("transformer_blocks",),
        "hidden_states",
        (
            ("image_rotary_emb", 0, 2),
            ("extra_pos_emb", 1, 3),
            ("embedded_timestep", 1, 3),
            ("temb", 1, 3),
            ("controlnet_residual", 1, 3),
        ),
        ("attn1", "ff"),
    ),
)
_PIXART_SPAN = SpanSite(("transformer_blocks",), "hidden_states", probes=("attn1", "ff"))
PIXART = replace(
    ADAPTER,
    classes=("PixArtTransformer2DModel",),
    span=_PIXART_SPAN,
)
DIT = replace(
    PIXART, classes=("DiTTransformer2DModel",), span=replace(_PIXART_SPAN, leave="proj_out_2")
)
# image_rotary_emb: rotations [1, N, D / 2]; attention_mask [B, N]
LUMINA_NEXT = Adapter(
    classes=("LuminaNextDiT2DModel",),
    attention=("layers.*.attn1",),
    geometry=latents(same_mask=True),
    span=SpanSite(
        ("layers",),
        rows=(("image_rotary_emb", 1, 3), ("attention_mask", 1, 2)),
        probes=("feed_forward",),  # what attn1 returns is still apart by heads
        leave="norm_out",
    ),
)
HUNYUAN_DIT = Adapter(
    classes=("HunyuanDiT2DModel",),
    attention=("blocks.*.attn1",),
    geometry=latents(),
    # image_rotary_emb: cosines and sines [N, D]; skip: all tokens as an earlier block left them
    span=SpanSite(
        ("blocks",),
        rows=(("image_rotary_emb", 0, 2), ("skip", 1, 3)),
        probes=("attn1", "ff"),
        whole=True,
    ),
)


def _frames(transformer, args) -> Geometry:
    """Latte folds the frames into the batch: each spatial block sees one frame at a time."""
    return Geometry((1, *grid_of(transformer, args["hidden_states"])[1:]))


LATTE = Adapter(
    classes=("LatteTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=_frames,
    no_span="blocks over space and over time take turns, each on another cut of all tokens",
)
