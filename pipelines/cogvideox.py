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


# image_rotary_emb: cosines and sines [N, D]
_SPAN = SpanSite(
    ("transformer_blocks",),
    "hidden_states",
    (("image_rotary_emb", 0, 2),),
    ("attn1",),  # the feed-forward runs on text, too
    text="encoder_hidden_states",
)
ADAPTER = Adapter(
    classes=("CogVideoXTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=_geometry,
    span=_SPAN,
)
# adds face features to all tokens between its blocks
CONSISID = replace(
    ADAPTER,
    classes=("ConsisIDTransformer3DModel",),
    span=replace(_SPAN, whole=True),
)
GLM = Adapter(
    classes=("GlmImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=latents("first"),
    span=replace(_SPAN, refuses=unless_given("kv_caches", "attention_mask")),
)
# CogView 4 has cosines and sines of the picture, as CogVideoX; CogView 3 has none
COGVIEW = replace(
    GLM,
    classes=("CogView4Transformer2DModel",),
    span=replace(_SPAN, refuses=unless_given("attention_mask")),
)
COGVIEW3 = replace(
    GLM,
    classes=("CogView3PlusTransformer2DModel",),
    span=replace(_SPAN, rows=(), refuses=unless_given("attention_mask")),
)
