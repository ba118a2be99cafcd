"""JoyImage Edit and Edit Plus: visual tokens of all images first, then the text."""

from dataclasses import replace
from math import prod

from dit_accel.pipelines.base import Adapter, Geometry, SpanSite
from dit_accel.pipelines.grids import grid_of, grid_of_images

_ATTENTION = ("double_blocks.*.attn",)


def _geometry(transformer, args) -> Geometry:
    x = args["hidden_states"]  # [B, C, T, H, W], or [B, images, C, T, H, W], one after another
    images = x.shape[1] if x.ndim == 6 else 1
    t, h, w = grid_of(transformer, x[:, 0] if x.ndim == 6 else x)
    return Geometry((images * t, h, w), None)


_SPAN = SpanSite(
    ("double_blocks",),
    rows=(("image_rotary_emb.0", 0, 2),),
    probes=("attn", "img_mlp"),
    text="encoder_hidden_states",
)
# image_rotary_emb: cosines and sines of the images [N, D], then of the text
ADAPTER = Adapter(
    classes=("JoyImageEditTransformer3DModel",),
    attention=_ATTENTION,
    geometry=_geometry,
    span=_SPAN,
)


def _listed(transformer, args) -> Geometry:
    """shape_list: per sample the (T, H, W) of its images; shorter samples are padded."""
    n, shapes = args["hidden_states"].shape[1], args["shape_list"]
    if any(sum(map(prod, sample)) != n for sample in shapes):
        return Geometry((1, 1, n), None, dense="the images of the batch differ in size")
    return Geometry(grid_of_images(shapes[0]), None)


def _ragged(transformer, args) -> str:
    return _listed(transformer, args).dense


# image_rotary_emb: cosines and sines [B, N, D]; attention_mask [B, 1, 1, N + text]
PLUS = Adapter(
    classes=("JoyImageEditPlusTransformer3DModel",),
    attention=_ATTENTION,
    geometry=_listed,
    span=replace(
        _SPAN, rows=(("image_rotary_emb", 1, 3), ("attention_mask", 3, 4)), refuses=_ragged
    ),
)
