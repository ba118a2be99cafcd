"""Bria Fibo 2: gist tokens of the text, the image and the images it is made from, in one row."""

from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

from dit_accel.pipelines.base import Adapter, Geometry, SpanSite
from dit_accel.pipelines.grids import grid_of, grid_of_images


def _geometry(transformer, args) -> Geometry:
    """Gist tokens come first, or last where the prompts of a batch make unlike numbers of them."""
    images = [args["hidden_states"], *(args.get("context_latents") or [])]
    grid = grid_of_images([grid_of(transformer, x) for x in images])
    mask, config = args.get("encoder_attention_mask"), transformer.config
    counts = compute_gist_count(
        [] if mask is None else mask.sum(1).tolist(),
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )
    return Geometry(grid, None, text_first=len(set(counts)) < 2)


# freqs_cis [1, gist + N, D / 2]; noise_mask and attn_mask [B, gist + N]
ADAPTER = Adapter(
    classes=("BriaFibo2Transformer2DModel",),
    attention=("layers.*.attention",),
    geometry=_geometry,
    span=SpanSite(
        ("layers",),
        "x",
        (("freqs_cis", 1, 3), ("noise_mask", 1, 2), ("attn_mask", 1, 2)),
        ("attention", "feed_forward"),
        single=("layers",),
        leave="final_layer",
        references_last=True,
    ),
)
