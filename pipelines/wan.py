"""Wan 2.1 and 2.2 (text, image and video to video): visual tokens only, text through `attn2`."""

from dit_accel.pipelines.base import Adapter, Geometry, Site


def _geometry(transformer, args) -> Geometry:
    # hidden_states [B, C, T, H, W] in latent pixels
    sizes = args["hidden_states"].shape[-3:]
    grid = tuple(n // p for n, p in zip(sizes, transformer.config.patch_size, strict=True))
    per_token = getattr(args.get("timestep"), "ndim", 1) == 2
    return Geometry(grid, fixed_order="timesteps are per token" if per_token else "")


ADAPTER = Adapter(
    classes=("WanTransformer3DModel",),
    attention=("blocks.*.attn1",),
    geometry=_geometry,
    enter=(Site("rope", 1), Site("patch_embedding", 2, flat=True)),
    leave=Site("proj_out", 1),
)
