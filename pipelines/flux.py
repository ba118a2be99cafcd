"""Flux.1: text and image tokens in one joint sequence, text first, in double and single blocks."""

from dit_accel.pipelines.base import Adapter, Geometry, Site


def _geometry(transformer, args) -> Geometry:
    # img_ids [N, 3] or [B, N, 3]: (image, row, column) of each token
    ids = args["img_ids"].reshape(-1, 3) if args["img_ids"].ndim == 2 else args["img_ids"][0]
    rows, columns = (int(ids[:, axis].max().item()) + 1 for axis in (1, 2))
    n_text = args["encoder_hidden_states"].shape[1]
    n = ids.shape[0]
    if n % (rows * columns):
        return Geometry((1, 1, n), n_text, True, "the image ids form no grid")
    control = args.get("controlnet_block_samples") or args.get("controlnet_single_block_samples")
    reason = "ControlNet residuals are added between blocks" if control is not None else ""
    return Geometry((n // (rows * columns), rows, columns), n_text, True, reason)


ADAPTER = Adapter(
    classes=("FluxTransformer2DModel",),
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    geometry=_geometry,
    enter=(Site("x_embedder", 1), Site("pos_embed", 0, text=True)),
    leave=Site("proj_out", 1),
)
