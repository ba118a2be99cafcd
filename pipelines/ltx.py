"""LTX-Video and LTX-2: packed visual tokens [B, N, C], their grid in the forward arguments.

LTX-2's audio and audio-video attention is left alone.
"""

from dit_accel.pipelines.base import Adapter, Geometry, Site, SpanSite

_POSITIONS = ("video_rotary_emb", "ca_video_rotary_emb")


def _geometry(transformer, args) -> Geometry:
    n = args["hidden_states"].shape[1]
    t, h, w = (args.get(name) or 0 for name in ("num_frames", "height", "width"))
    if t * h * w != n:  # conditioning frames were put before the clip
        return Geometry((1, 1, n))
    steps = args["timestep"]
    per_token = steps.ndim == 2 and steps.shape[1] > 1
    return Geometry((t, h, w), fixed_order="timesteps are per token" if per_token else "")


ADAPTER = Adapter(
    classes=("LTXVideoTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=_geometry,
    enter=(Site("rope", 1), Site("proj_in", 1)),
    leave=Site("proj_out", 1),
    # image_rotary_emb: cosines and sines [B, N, C]; temb [B, N, 6 C] where timesteps are per token
    span=SpanSite(
        ("transformer_blocks",),
        "hidden_states",
        (("image_rotary_emb", 1, 3), ("temb", 1, 3)),
        ("attn1", "ff"),
    ),
)
LTX2 = Adapter(
    classes=("LTX2VideoTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=_geometry,
    # cosines and sines [B, N, C], or by heads [B, H, N, D / 2]; modulation [B, N, …] where
    # timesteps are per token; the mask of reference frames [B, N, N]. Sound runs in every step.
    span=SpanSite(
        ("transformer_blocks",),
        rows=(
            *((name, *where) for name in _POSITIONS for where in ((1, 3), (2, 4))),
            *((name, 1, 3) for name in ("temb", "temb_ca_scale_shift", "temb_ca_gate")),
            ("self_attention_mask", 1, 3),
            ("self_attention_mask", 2, 3),
        ),
        probes=("attn1", "ff"),
        text="audio_hidden_states",
        apart=True,
        readers=("transformer_blocks.*.video_to_audio_attn",),
    ),
)
