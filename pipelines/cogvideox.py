"""CogVideoX, ConsisID, CogView: text first in one joint sequence, attention by plain SDPA."""

from dataclasses import replace
from math import ceil

from dit_accel.pipelines.base import Adapter, Geometry, SpanSite, unless_given
from dit_accel.pipelines.grids import latents, patch_size


def _geometry(transformer, args) -> Geometry:
    # hidden_states [B, T, C, H, W]; CogVideoX 1.5 also patches time
    t, _, h, w = args["hidden_states"].shape[1:]
    p_t, p, _ = patch_size(transformer)
    return Geometry((ceil(t / p_t), h // p, w // p), None, True)


# ConsisID adds face features between its blocks, so its tokens cannot be pruned
CONSISID = Adapter(
    classes=("ConsisIDTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=_geometry,
)
# image_rotary_emb: cosines and sines [N, D]
ADAPTER = replace(
    CONSISID,
    classes=("CogVideoXTransformer3DModel",),
    span=SpanSite(
        ("transformer_blocks",),
        "hidden_states",
        (("image_rotary_emb", 0, 2),),
        ("attn1",),  # the feed-forward runs on text, too
        text="encoder_hidden_states",
    ),
)
GLM = Adapter(
    classes=("GlmImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=latents("first"),
)
# CogView 4 has cosines and sines of the picture, as CogVideoX; CogView 3 has none
COGVIEW = replace(
    GLM,
    classes=("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
    span=ADAPTER.span._replace(refuses=unless_given("attention_mask")),
)
