"""Families with one joint sequence of text and image latents [B, C, (T,) H, W]."""

from dit_accel.pipelines.base import Adapter, Geometry, SpanSite, unless_given
from dit_accel.pipelines.grids import latents

EASYANIMATE = Adapter(
    classes=("EasyAnimateTransformer3DModel",),
    attention=("transformer_blocks.*.attn1",),
    geometry=latents("first"),
    # image_rotary_emb: cosines and sines [N, D]
    span=SpanSite(
        ("transformer_blocks",),
        "hidden_states",
        (("image_rotary_emb", 0, 2),),
        ("attn1", "ff"),
        text="encoder_hidden_states",
    ),
)
# `attn2`, in SD 3.5's dual blocks, is a second self-attention of the visual tokens alone
SD3 = Adapter(
    classes=("SD3Transformer2DModel",),
    attention=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
    geometry=latents("last"),
    span=SpanSite(
        ("transformer_blocks",),
        "hidden_states",
        probes=("attn", "ff"),
        text="encoder_hidden_states",
        visual=1,
        whole=("block_controlnet_hidden_states",),
        refuses=unless_given("skip_layers"),
    ),
)
AURAFLOW = Adapter(
    classes=("AuraFlowTransformer2DModel",),
    attention=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    geometry=latents("first"),
    span=SpanSite(
        ("joint_transformer_blocks", "single_transformer_blocks"),
        probes=("attn", "ff"),
        text="encoder_hidden_states",
        visual=1,
        single=("single_transformer_blocks",),
    ),
)


def _uneven(transformer, args) -> str:
    lengths = args["encoder_attention_mask"].sum(1).tolist()
    return "the prompts of the batch differ in length" if len(set(lengths)) > 1 else ""


LUMINA2 = Adapter(
    classes=("Lumina2Transformer2DModel",),
    attention=("layers.*.attn",),
    geometry=latents("first"),
    # image_rotary_emb: rotations [B, text + N, D / 2]
    span=SpanSite(
        ("layers",),
        rows=(("image_rotary_emb", 1, 3),),
        probes=("attn", "feed_forward"),
        single=("layers",),
        leave="norm_out",
        refuses=_uneven,
    ),
)
ERNIE = Adapter(
    classes=("ErnieImageTransformer2DModel",),
    attention=("layers.*.self_attention",),
    geometry=latents("last"),
    # rotary_pos_emb [B, N + text, 1, D]; modulation [N + text, B, C]; mask [B, 1, 1, N + text]
    span=SpanSite(
        ("layers",),
        "x",
        (("rotary_pos_emb", 1, 4), ("temb", 0, 3), ("attention_mask", 3, 4)),
        ("self_attention",),
        single=("layers",),
        tokens_first=True,
        leave="final_linear",
    ),
)
# visual queries over text and visual keys
PRX = Adapter(
    classes=("PRXTransformer2DModel",),
    attention=("blocks.*.attention",),
    geometry=latents("first"),
    # image_rotary_emb: rotations [B, 1, N, D / 2, 2, 2]
    span=SpanSite(
        ("blocks",),
        rows=(("image_rotary_emb", 2, 6),),
        probes=("attention",),
        keys="encoder_hidden_states",
        leave="final_layer",
    ),
)


def _hidream(transformer, args) -> Geometry:
    """Latents that are no square are padded to the largest sequence."""
    x = args["hidden_states"]
    if x.ndim == 4 and x.shape[2] == x.shape[3]:
        return latents("last")(transformer, args)
    return Geometry((1, 1, transformer.max_seq if x.ndim == 4 else x.shape[1]), None)


HIDREAM = Adapter(
    classes=("HiDreamImageTransformer2DModel",),
    attention=("double_stream_blocks.*.attn1", "single_stream_blocks.*.attn1"),
    geometry=_hidream,
    # rotations [B, N + text, 1, D / 2, 2, 2]; masks [B, N] or [B, N + text]. Text comes anew before
    # each block, and is cut off behind it by a number of tokens that was counted before
    span=SpanSite(
        ("double_stream_blocks", "single_stream_blocks"),
        rows=(("image_rotary_emb", 1, 6), ("hidden_states_masks", 1, 2)),
        probes=("block.attn1",),
        text="encoder_hidden_states",
        single=("single_stream_blocks",),
        whole=True,
        leave="final_layer",
    ),
)


def _z_image(transformer, args) -> Geometry:
    """x is one [C, T, H, W] per sample; each is padded to full rows of 32 before the text."""
    x = args["x"]
    if isinstance(x[0], list):
        return Geometry((1, 1, 1), None, dense="reference images lie between text and image")
    if len({image.shape for image in x}) > 1:
        return Geometry((1, 1, 1), None, dense="the images of the batch differ in size")
    p, p_t = args.get("patch_size") or 2, args.get("f_patch_size") or 1
    t, h, w = x[0].shape[1:]
    return Geometry((t // p_t, h // p, w // p), None)


def _ragged(transformer, args) -> str:
    return _z_image(transformer, args).dense


# freqs_cis [B, N + text, D / 2]; attn_mask [B, N + text]
Z_IMAGE = Adapter(
    classes=("ZImageTransformer2DModel",),
    attention=("layers.*.attention",),
    geometry=_z_image,
    span=SpanSite(
        ("layers",),
        "x",
        (("freqs_cis", 1, 3), ("attn_mask", 1, 2)),
        ("attention", "feed_forward"),
        single=("layers",),
        whole=("controlnet_block_samples",),
        leave="all_final_layer.2-1",
        refuses=_ragged,
    ),
)
