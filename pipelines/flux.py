"""Flux.1 (also Kontext, Fill, Control): text first in one joint sequence."""

from dit_accel.pipelines.base import Adapter, Geometry, Site, SpanSite
from dit_accel.pipelines.grids import grid_of_ids

_MASK = "joint_attention_kwargs.attention_mask"


def _geometry(transformer, args) -> Geometry:
    control = args.get("controlnet_block_samples") or args.get("controlnet_single_block_samples")
    reason = "ControlNet residuals are added between blocks" if control else ""
    if (args.get("joint_attention_kwargs") or {}).get("attention_mask") is not None:
        reason = reason or "an attention mask has the tokens in raster order"
    n_text = args["encoder_hidden_states"].shape[1]
    return Geometry(grid_of_ids(args["img_ids"]), n_text, True, reason)


ADAPTER = Adapter(
    classes=("FluxTransformer2DModel",),
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    geometry=_geometry,
    enter=(Site("x_embedder", 1), Site("pos_embed", 0, text=True)),
    leave=Site("proj_out", 1),
    # image_rotary_emb: cosines and sines [text + N, D]; a mask [B, 1, 1 or text + N, text + N] may
    # come through the user's keywords
    span=SpanSite(
        ("transformer_blocks", "single_transformer_blocks"),
        "hidden_states",
        (("image_rotary_emb", 0, 2), (_MASK, 2, 4), (_MASK, 3, 4)),
        ("attn", "ff"),
        text="encoder_hidden_states",
        visual=1,
        whole=("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
)
