"""Image families with packed tokens [B, N, C], text first; ids or shapes tell their grid."""

from dit_accel.pipelines.base import Adapter, Geometry
from dit_accel.pipelines.grids import grid_of_ids, grid_of_images, image_ids

_BLOCKS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

ADAPTER = Adapter(
    classes=(
        "BriaFiboTransformer2DModel",
        "BriaTransformer2DModel",
        "Flux2Transformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    ),
    attention=_BLOCKS,
    geometry=image_ids(),
)
# each block makes the product of valid queries and valid keys anew
CHROMA = Adapter(
    classes=("ChromaTransformer2DModel",),
    attention=_BLOCKS,
    geometry=image_ids(same_mask=True),
)


def _qwen(transformer, args) -> Geometry:
    # img_shapes: per sample the (T, H, W) of the image and of its references
    grid = grid_of_images(args["img_shapes"][0])
    return Geometry(grid, n_text=None, text_first=True, same_mask=True)


QWEN = Adapter(
    classes=("QwenImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    geometry=_qwen,
)


def _nucleus(transformer, args) -> Geometry:
    grid = grid_of_images(args["img_shapes"][0])
    return Geometry(grid, n_text=None)


# visual queries over visual and text keys
NUCLEUS = Adapter(
    classes=("NucleusMoEImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    geometry=_nucleus,
)


def _krea2(transformer, args) -> Geometry:
    # position_ids [N_text + N, 3]: (image, row, column), text first
    n, ids = args["hidden_states"].shape[1], args["position_ids"]
    if not hasattr(ids, "_accel_grid"):
        ids._accel_grid = grid_of_ids(ids[-n:])
    return Geometry(ids._accel_grid, n_text=None, text_first=True)


KREA2 = Adapter(
    classes=("Krea2Transformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    geometry=_krea2,
)
