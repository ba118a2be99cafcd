"""HunyuanVideo and its kin: 3 × 8 × 8 tokens, two heads of 64."""

from zoo import TEXT, Video, at, padding, x

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": (16, 24, 24),
}


def hunyuan(*lengths, channels=4, **more):
    b = len(lengths)
    return dict(
        hidden_states=x(b, channels, 3, 16, 16),
        timestep=at(*[500.0] * b),
        encoder_hidden_states=x(b, TEXT, 16),
        encoder_attention_mask=padding(*lengths),
        **more,
    )


def framepack():
    frames = {
        "indices_latents": [3, 4, 5],
        "indices_latents_clean": [0, 12],
        "indices_latents_history_2x": [1, 2],
    }
    frames["indices_latents_history_4x"] = [6, 7, 8, 9]
    return dict(
        **hunyuan(12),
        pooled_projections=x(1, 8),
        guidance=at(1000.0),
        image_embeds=x(1, 5, 16),
        latents_clean=x(1, 4, 2, 16, 16),
        latents_history_2x=x(1, 4, 2, 16, 16),
        latents_history_4x=x(1, 4, 4, 16, 16),
        **{name: at(*ids).long() for name, ids in frames.items()},
    )


def hunyuan15():
    return dict(
        **hunyuan(12, 7),
        encoder_hidden_states_2=x(2, 6, 8),
        encoder_attention_mask_2=padding(4, 6, of=6),
        image_embeds=x(2, 3, 8),
    )


HUNYUANS = (
    Video(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideo, SkyReels I2V",
        dict(HUNYUAN, pooled_projection_dim=8),
        lambda: dict(hunyuan(12, 20), pooled_projections=x(2, 8), guidance=at(1000.0, 1000.0)),
        mask="key padding",
    ),
    Video(
        "HunyuanVideoFramepackTransformer3DModel",
        "FramePack",
        dict(
            HUNYUAN,
            pooled_projection_dim=8,
            has_image_proj=True,
            image_proj_dim=16,
            has_clean_x_embedder=True,
        ),
        framepack,
        grid=(1, 1, 340),
        history=148,
        note="history and new frames in one row of tokens, so the order stays raster",
    ),
    Video(
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideo 1.5",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": (16, 24, 24),
        },
        hunyuan15,
        mask="key padding, in place of diffusers' N × N mask",
        note="dense calls, too, are freed of the N × N mask",
    ),
    Video(
        "MotifVideoTransformer3DModel",
        "Motif-Video",
        {**{k: v for k, v in HUNYUAN.items() if k != "num_refiner_layers"}, "num_layers": 2},
        lambda: hunyuan(12, 20),
        layers=3,
        mask="key padding",
        note="pruning spans the dual-stream blocks",
    ),
)
