"""CogVideoX and ConsisID: 3 × 8 × 8 tokens, two heads of 64."""

from zoo import TEXT, Video, at, x

COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": TEXT,
}


def cog(**more):
    return dict(
        hidden_states=x(2, 3, 4, 16, 16),
        encoder_hidden_states=x(2, TEXT, 16),
        timestep=at(500.0, 500.0),
        **more,
    )


COGS = (
    Video(
        "CogVideoXTransformer3DModel",
        "CogVideoX 1.0 and 1.5",
        COG,
        lambda: cog(image_rotary_emb=(x(192, 64), x(192, 64))),
        axes="BTCHW",
    ),
    Video(
        "ConsisIDTransformer3DModel",
        "ConsisID",
        dict(
            COG,
            is_train_face=True,
            cross_attn_interval=1,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=16,
            LFE_vit_dim=16,
            LFE_depth=5,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=4,
            LFE_output_dim=85,
            LFE_ff_mult=1,
        ),
        lambda: cog(
            image_rotary_emb=(x(192, 64), x(192, 64)),
            id_cond=x(2, 16),
            id_vit_hidden=[x(2, 7, 16) for _ in range(5)],
        ),
        axes="BTCHW",
    ),
)
