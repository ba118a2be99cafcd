"""Image families with packed tokens [B, N, C], text first; ids or shapes tell their grid."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from torch import Tensor

from dit_accel.pipelines.base import Adapter, Geometry, SpanSite, unless_given
from dit_accel.pipelines.grids import grid_of_ids, grid_of_images, image_ids, once, sizes_of

_BLOCKS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

_CONTROL = ("controlnet_block_samples", "controlnet_single_block_samples")
# image_rotary_emb: cosines and sines [text + N, D]; text and image in one row after the two. A mask
# [B, 1, 1 or text + N, text + N] comes through the user's, or the pipeline's, keywords
_MASK = "joint_attention_kwargs.attention_mask"
_SPAN = SpanSite(
    ("transformer_blocks", "single_transformer_blocks"),
    rows=(("image_rotary_emb", 0, 2), (_MASK, 2, 4), (_MASK, 3, 4)),
    probes=("attn", "ff"),
    text="encoder_hidden_states",
    visual=1,
    single=("single_transformer_blocks",),
)
ADAPTER = Adapter(
    classes=("BriaFiboTransformer2DModel",),
    attention=_BLOCKS,
    geometry=image_ids(),
    span=_SPAN,
)
FLUX2 = replace(
    ADAPTER,
    classes=("Flux2Transformer2DModel",),
    span=replace(_SPAN, refuses=unless_given("kv_cache_mode")),
)
DOUBLE = replace(
    ADAPTER,
    classes=(
        "BriaTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    ),
    span=replace(_SPAN, rows=_SPAN.rows[:1], single=(), whole=_CONTROL),
)


def _flux3(transformer, args) -> Geometry:
    # reference images follow the image; blocks before the joint ones see each by itself
    grid, cond = grid_of_ids(args["img_ids"]), args.get("image_cond_ids")
    if cond is not None:
        grid = grid_of_images([grid, grid_of_ids(cond)])
    return Geometry(grid, n_text=None, text_first=True)


# image_rotary_emb: cosines and sines [text + N, D]; temb_mod [B, N, 3 C]
FLUX3 = Adapter(
    classes=("Flux3Transformer2DModel",),
    attention=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
    geometry=_flux3,
    span=SpanSite(
        ("single_transformer_blocks",),
        rows=(("image_rotary_emb", 0, 2), ("temb_mod", 1, 3)),
        probes=("attn", "ff"),
        text="encoder_hidden_states",
        visual=1,
        references_last=True,
    ),
)
# each block makes the product of valid queries and valid keys anew
CHROMA = Adapter(
    classes=("ChromaTransformer2DModel",),
    attention=_BLOCKS,
    geometry=image_ids(same_mask=True),
    span=replace(
        _SPAN,
        rows=(*_SPAN.rows, ("attention_mask", 1, 2)),
        whole=_CONTROL,
    ),
)


def _qwen(transformer, args) -> Geometry:
    # img_shapes: per sample the (T, H, W) of the image and of its references
    grid = grid_of_images(sizes_of(args["img_shapes"]))
    return Geometry(grid, n_text=None, text_first=True, same_mask=True)


QWEN = Adapter(
    classes=("QwenImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    geometry=_qwen,
    # image_rotary_emb: rotations of the picture [N, D / 2], then of the text; modulate_index [B, N]
    span=SpanSite(
        ("transformer_blocks",),
        "hidden_states",
        (("image_rotary_emb.0", 0, 2), ("modulate_index", 1, 2)),
        text="encoder_hidden_states",
        visual=1,
        probes=("attn", "img_mlp"),
        whole=_CONTROL,
    ),
)


def _nucleus(transformer, args) -> Geometry:
    grid = grid_of_images(sizes_of(args["img_shapes"]))
    return Geometry(grid, n_text=None)


# visual queries over visual and text keys
NUCLEUS = Adapter(
    classes=("NucleusMoEImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    geometry=_nucleus,
    # rotations of the picture [N, D / 2], then of the text; attention_mask [B, N + text]
    span=SpanSite(
        ("transformer_blocks",),
        rows=(("image_rotary_emb.0", 0, 2), ("attention_kwargs.attention_mask", 1, 2)),
        probes=("attn", "img_mlp"),
        keys="encoder_hidden_states",
    ),
)


def _krea2(transformer, args) -> Geometry:
    # position_ids [N_text + N, 3]: (image, row, column), text first
    n, ids = args["hidden_states"].shape[1], args["position_ids"]
    return Geometry(once(_last(n), ids), n_text=None, text_first=True)


@cache
def _last(n: int) -> Callable[[Tensor], tuple[int, int, int]]:
    return lambda ids: grid_of_ids(ids[-n:])


KREA2 = Adapter(
    classes=("Krea2Transformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    geometry=_krea2,
    # image_rotary_emb: cosines and sines [text + N, D]; attention_mask [B, 1, 1, text + N]
    span=SpanSite(
        ("transformer_blocks",),
        rows=(("image_rotary_emb", 0, 2), ("attention_mask", 3, 4)),
        probes=("attn", "ff"),
        single=("transformer_blocks",),
        leave="final_layer",
    ),
)
