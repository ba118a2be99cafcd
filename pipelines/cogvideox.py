"""CogVideoX, ConsisID, CogView: text first in one joint sequence, attention by plain SDPA."""

from math import ceil

from dit_accel.pipelines.base import Adapter, Geometry
from dit_accel.pipelines.grids import latents, patch_size


def _geometry(transformer, args) -> Geometry:
    # hidden_states [B, T, C, H, W]; CogVideoX 1.5 also patches time
    t, _, h, w = args["hidden_states"].shape[1:]
    p_t, p, _ = patch_size(transformer)
    return Geometry((ceil(t / p_t), h // p, w // p), None, True)


ADAPTER = Adapter(
    classes=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    attention=("transformer_blocks.*.attn1",),
    geometry=_geometry,
)
COGVIEW = Adapter(
    classes=(
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "GlmImageTransformer2DModel",
    ),
    attention=("transformer_blocks.*.attn1",),
    geometry=latents("first"),
)
