"""Wan 2.1 and 2.2 and what was made from them: visual tokens only, text through `attn2`."""

from dataclasses import replace

from dit_accel.pipelines.base import Adapter, Geometry, Site, SpanSite
from dit_accel.pipelines.grids import grid_of, latents


def _geometry(transformer, args) -> Geometry:
    grid = grid_of(transformer, args["hidden_states"])
    if getattr(args.get("timestep"), "ndim", 1) == 2:
        return Geometry(grid, fixed_order="timesteps are per token")
    if getattr(transformer.config, "num_frame_per_block", 1) > 1:  # SkyReels V2
        return Geometry(grid, fixed_order="its block-causal mask has the tokens in raster order")
    control = args.get("control_hidden_states")
    if control is not None and grid_of(transformer, control) != grid:
        return Geometry(grid, fixed_order="the control video has another size")
    return Geometry(grid)


_SPAN = SpanSite(
    ("blocks",), "hidden_states", (("rotary_emb", 1, 4), ("temb", 1, 4)), ("attn1", "ffn")
)
ADAPTER = Adapter(
    classes=(
        "WanTransformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    attention=("blocks.*.attn1",),
    geometry=_geometry,
    enter=(Site("rope", 1), Site("patch_embedding", 2, flat=True)),
    leave=Site("proj_out", 1),
    norm_rope=True,
    # rotary_emb: cosines and sines [1, N, 1, D]; temb [B, N, 6, C] where timesteps are per token
    span=_SPAN,
)
# diffusion forcing: modulation [B, 6, N, C] per token, and a block-causal mask over all tokens
SKYREELS = replace(
    ADAPTER,
    classes=("SkyReelsV2Transformer3DModel",),
    span=replace(
        _SPAN,
        rows=(
            ("rotary_emb", 1, 4),
            ("temb", 2, 4),
            ("attention_mask", 2, 4),
            ("attention_mask", 3, 4),
        ),
    ),
)
VACE = Adapter(
    classes=("WanVACETransformer3DModel",),
    attention=("vace_blocks.*.attn1", "blocks.*.attn1"),
    geometry=_geometry,
    enter=(*ADAPTER.enter, Site("vace_patch_embedding", 2, flat=True)),
    leave=Site("proj_out", 1),
    norm_rope=True,
    # a hint is added to all tokens after a block; the blocks that make the hints see all tokens
    span=replace(_SPAN, whole=True),
)
# its face blocks attend frame by frame, so tokens cannot pass through the model permuted
ANIMATE = Adapter(
    classes=("WanAnimateTransformer3DModel",),
    attention=("blocks.*.attn1",),
    geometry=latents(),
    norm_rope=True,
    span=replace(_SPAN, whole=True),
)


def _frames_first(transformer, args) -> Geometry:
    # hidden_states [B, T, C, H, W]
    return Geometry(grid_of(transformer, args["hidden_states"].transpose(1, 2)))


ANYFLOW = Adapter(
    classes=("AnyFlowTransformer3DModel",),
    attention=("blocks.*.attn1",),
    geometry=_frames_first,
    # rotary_emb: of queries and of keys [1, 1, N, D / 2]; temb [B, N, 6, C]
    span=replace(
        _SPAN, rows=(("rotary_emb.query", 2, 4), ("rotary_emb.key", 2, 4), ("temb", 1, 4))
    ),
)


def _after_history(transformer, args) -> Geometry:
    grid = grid_of(transformer, args["hidden_states"])
    return Geometry(grid, n_text=None, text_first=True, one_row=True)


# Earlier clips lie before the visual tokens: each query reads them all, as it reads text elsewhere.
HELIOS = Adapter(
    classes=("HeliosTransformer3DModel",),
    attention=("blocks.*.attn1",),
    geometry=_after_history,
    # history and new tokens in one row; rotary_emb [B, N, D], temb [B, N, 6, C] of both
    span=SpanSite(
        ("blocks",),
        rows=(("rotary_emb", 1, 3), ("temb", 1, 4)),
        probes=("attn1", "ffn"),
        single=("blocks",),
        count="original_context_length",
    ),
)
