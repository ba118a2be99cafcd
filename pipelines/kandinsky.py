"""Kandinsky 5: visual self-attention on [B, T, H, W, C]; its own NABLA mask makes it stay dense."""

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
