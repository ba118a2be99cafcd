"""HunyuanVideo and its kin: one joint sequence, visual tokens first, padded text last.

The attention mask hides the padded text keys; the token refiner of the text stays dense.
"""

from dataclasses import replace
from math import ceil, prod

from dit_accel.pipelines.base import Adapter, Geometry, Site, SpanSite
from dit_accel.pipelines.grids import grid_of, latents

_ATTENTION = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")


def _own_modulation(transformer, args) -> str:
    replaces = getattr(transformer.config, "image_condition_type", None) == "token_replace"
    return "the first frame has its own modulation" if replaces else ""


def _geometry(transformer, args) -> Geometry:
    reason = _own_modulation(transformer, args)
    return Geometry(grid_of(transformer, args["hidden_states"]), None, fixed_order=reason)


def _with_history(transformer, args) -> Geometry:
    """The frames before this section come first, at full, half and quarter resolution."""
    x = args["hidden_states"]
    grid = grid_of(transformer, x)
    if args.get("latents_clean") is None:
        return Geometry(grid, None)
    patches = {
        "latents_clean": (1, 2, 2),
        "latents_history_2x": (2, 4, 4),
        "latents_history_4x": (4, 8, 8),
    }
    n = prod(grid)
    for name, patch in patches.items():
        if args.get(name) is not None:
            sizes = args[name].shape[2:]
            n += prod(ceil(size / p) for size, p in zip(sizes, patch, strict=True))
    return Geometry((1, 1, n), None)


# freqs_cis, image_rotary_emb: cosines and sines [N, D]; attention_mask [B, 1, 1, N + text]
_SPAN = SpanSite(
    ("transformer_blocks", "single_transformer_blocks"),
    "hidden_states",
    (("freqs_cis", 0, 2), ("image_rotary_emb", 0, 2), ("attention_mask", 3, 4)),
    ("attn", "ff"),
    text="encoder_hidden_states",
    refuses=_own_modulation,
)
ADAPTER = Adapter(
    classes=("HunyuanVideoTransformer3DModel",),
    attention=_ATTENTION,
    geometry=_geometry,
    enter=(Site("rope", 0), Site("x_embedder", 1)),
    leave=Site("proj_out", 1),
    span=_SPAN,
)
FRAMEPACK = Adapter(
    classes=("HunyuanVideoFramepackTransformer3DModel",),
    attention=_ATTENTION,
    geometry=_with_history,
    span=replace(_SPAN, refuses=None),
)
_IMAGE_SPAN = replace(_SPAN, rows=_SPAN.rows[1:], refuses=None)
IMAGE = Adapter(
    classes=("HunyuanImageTransformer2DModel",),
    attention=_ATTENTION,
    geometry=latents("last"),
    span=_IMAGE_SPAN,
)
# of its single blocks, the last ones start again from the first tokens
MOTIF = replace(
    IMAGE,
    classes=("MotifVideoTransformer3DModel",),
    span=replace(_IMAGE_SPAN, blocks=("transformer_blocks",)),
)
