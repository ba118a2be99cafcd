"""Kandinsky 5 and 6: visual self-attention on [B, T, H, W, C].

A checkpoint's own NABLA mask makes it stay dense. Sound, in Kandinsky 6, is left alone.
"""

from dit_accel.pipelines.base import Adapter, Geometry, SpanSite, unless_given


def _geometry(transformer, args) -> Geometry:
    sizes = args["hidden_states"].shape[1:4]
    grid = tuple(n // p for n, p in zip(sizes, transformer.patch_size, strict=True))
    sparse = args.get("sparse_params") is not None
    return Geometry(grid, dense="the checkpoint brings its own sparse mask" if sparse else "")


ADAPTER = Adapter(
    classes=("Kandinsky5Transformer3DModel",),
    attention=("visual_transformer_blocks.*.self_attention",),
    geometry=_geometry,
    # rope: rotations [1, N, 1, D / 2, 2, 2]
    span=SpanSite(
        ("visual_transformer_blocks",),
        "visual_embed",
        (("rope", 1, 6),),
        ("self_attention", "feed_forward"),
        leave="out_layer.out_layer",
        refuses=unless_given("sparse_params"),
    ),
)
# vis_rope: rotations [N, 1, D / 2, 2, 2]. Sound runs in every step
SIX = Adapter(
    classes=("Kandinsky6Transformer3DModel",),
    attention=("visual_transformer_blocks.*.video_dec_block.self_attention",),
    geometry=_geometry,
    span=SpanSite(
        ("visual_transformer_blocks",),
        "vis",
        (("vis_rope", 0, 5),),
        ("video_dec_block.self_attention", "video_dec_block.feed_forward"),
        text="aud",
        apart=True,
        readers=("visual_transformer_blocks.*.av_cross_attention",),
        leave="out_layer.out_layer",
    ),
)
