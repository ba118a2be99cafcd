"""Families that are handed one row of tokens, and indices of those that are the picture."""

from math import prod

from torch import Tensor

from dit_accel.pipelines.base import Adapter, Geometry, SpanSite
from dit_accel.pipelines.grids import grid_of_ids, once, sizes_of

_PICTURE = 2  # Ideogram's indicator of image tokens
_SLOT = 4  # latent tokens in an image slot of Qwen's text encoder


def _ideogram(transformer, args) -> Geometry:
    """Text, padded in front, then the image. Costs a synchronisation, once per `indicator`."""
    return once(_roles, args["indicator"], args["segment_ids"], args["position_ids"])


def _roles(roles: Tensor, segments: Tensor, positions: Tensor) -> Geometry:
    picture = roles == _PICTURE
    n = int(picture[0].sum())
    if not bool(picture[:, -n:].all()) or int(picture.sum()) != n * len(roles):
        return Geometry((1, 1, n), None, dense="the image tokens do not come last")
    if not bool((segments[:, -n:] == segments[:, -1:]).all()):
        return Geometry((1, 1, n), None, dense="several samples share a row")
    return Geometry(grid_of_ids(positions[0, -n:]), None, text_first=True, same_mask=True)


def _unmixed(transformer, args) -> str:
    return _ideogram(transformer, args).dense


# image_rotary_emb: cosines and sines [B, N, D]; mask [B, 1, N, N], who shares a sample; times
# [B, 1 or N, C]
IDEOGRAM = Adapter(
    classes=("Ideogram4Transformer2DModel",),
    attention=("layers.*.attention",),
    geometry=_ideogram,
    span=SpanSite(
        ("layers",),
        rows=(
            ("image_rotary_emb", 1, 3),
            ("attention_mask", 2, 4),
            ("attention_mask", 3, 4),
            ("adaln_input", 1, 3),
        ),
        probes=("attention", "feed_forward"),
        single=("layers",),
        leave="final_layer",
        refuses=_unmixed,
    ),
)


def _minimax(transformer, args) -> Geometry:
    """Text, references and sound, then the clip, the last run of `video_indices`."""
    return once(_last_run, args["video_indices"], args["position_ids"], args["token_tags"])


def _last_run(rows: Tensor, positions: Tensor, tags: Tensor) -> Geometry:
    ahead = (rows - rows.new_tensor(range(len(rows)))).tolist()
    n = ahead.count(ahead[-1])
    if int(rows[-1]) != len(positions) - 1:
        return Geometry((1, 1, n), None, dense="the clip's tokens do not come last")
    h, w = (len(positions[-n:, axis].unique()) for axis in (1, 2))
    grid = (n // (h * w), h, w) if n % (h * w) == 0 else (1, 1, n)
    _, ahead = tags[: len(positions) - n].unique_consecutive(return_counts=True)
    return Geometry(grid, None, text_first=True, one_row=True, sections=tuple(ahead.tolist()))


def _clip_last(transformer, args) -> str:
    return _minimax(transformer, args).dense


# rotary_emb: cosines and sines [N, D]; adaln_indices [N]
MINIMAX = Adapter(
    classes=("MiniMaxH3Transformer3DModel",),
    attention=("transformer_blocks.*.attn",),
    geometry=_minimax,
    span=SpanSite(
        ("transformer_blocks",),
        rows=(("rotary_emb", 0, 2), ("adaln_indices", 0, 1)),
        probes=("attn", "ff"),
        single=("transformer_blocks",),
        refuses=_clip_last,
    ),
)


def _qwen21(transformer, args) -> Geometry:
    """Text and reference images, which attend to what lies before them, then the image. A slot of
    the text encoder stands for four latent tokens; those of the image are not yet among them."""
    shapes = sizes_of(args["img_shapes"])
    references = sum(prod(shape) for shape in shapes[:-1])
    n_text = args["encoder_hidden_states"].shape[1] + references - references // _SLOT
    t, h, w = shapes[-1]
    return Geometry((t, h, w), n_text, True, same_mask=True, segments=True)


# rotary_emb [N, D / 2]; target_token_mask [N]; key_valid [B, N]; attention_mask [B, 1, 1, N] with a
# filled cache. N: of all, or of the image where the others are in the cache
QWEN21 = Adapter(
    classes=("QwenImage21Transformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    geometry=_qwen21,
    span=SpanSite(
        ("transformer_blocks",),
        rows=(
            ("rotary_emb", 0, 2),
            ("target_token_mask", 0, 1),
            ("key_valid", 1, 2),
            ("attention_mask", 3, 4),
        ),
        probes=("attn", "img_mlp"),
        single=("transformer_blocks",),
    ),
)
