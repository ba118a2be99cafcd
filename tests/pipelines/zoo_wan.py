"""Wan and what was made from it: 3 × 8 × 8 tokens, two heads of 64."""

from zoo import TEXT, Video, at, x

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


def wan(**more):
    return dict(
        hidden_states=x(1, 16, 3, 16, 16),
        timestep=at(500.0),
        encoder_hidden_states=x(1, TEXT, 32),
        **more,
    )


WANS = (
    Video("WanTransformer3DModel", "Wan 2.1 and 2.2, Lucy Edit", WAN, wan),
    Video(
        "WanVACETransformer3DModel",
        "Wan VACE",
        dict(WAN, vace_layers=[0], vace_in_channels=16),
        lambda: wan(control_hidden_states=x(1, 16, 3, 16, 16)),
        layers=3,
    ),
    Video(
        "WanAnimateTransformer3DModel",
        "Wan Animate",
        dict(
            WAN,
            in_channels=36,
            latent_channels=16,
            image_dim=None,
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        lambda: dict(
            wan(pose_hidden_states=x(1, 16, 2, 16, 16), face_pixel_values=x(1, 3, 5, 16, 16)),
            hidden_states=x(1, 36, 3, 16, 16),
        ),
        note="face blocks attend frame by frame and stay dense",
    ),
    Video("ChronoEditTransformer3DModel", "ChronoEdit", WAN, wan),
    Video(
        "SkyReelsV2Transformer3DModel",
        "SkyReels V2",
        WAN,
        wan,
        note="the block-causal mask of diffusion forcing makes it stay dense",
    ),
    Video(
        "AnyFlowTransformer3DModel",
        "AnyFlow",
        {k: v for k, v in WAN.items() if k != "qk_norm"},
        lambda: dict(
            wan(),
            hidden_states=x(1, 3, 16, 16, 16),
            r_timestep=x(1, 3) + 400,
            timestep=x(1, 3) + 500,
        ),
        axes="BTCHW",
    ),
    Video(
        "HeliosTransformer3DModel",
        "Helios",
        dict(
            {k: v for k, v in WAN.items() if k != "rope_max_seq_len"},
            rope_dim=(16, 24, 24),
        ),
        lambda: dict(
            wan(),
            indices_hidden_states=at(4, 5, 6)[None],
            indices_latents_history_short=at(2, 3)[None],
            latents_history_short=x(1, 16, 2, 16, 16),
        ),
        note="every query reads the whole history",
    ),
)
