"""Video transformers: 3 × 8 × 8 tokens, two heads of 64."""

import torch
from zoo import TEXT, Video, at, padding, x

JOY = {
    "in_channels": 4,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": [16, 24, 24],
}


def minimax():
    """Text, sound and the clip in one row."""
    clip, sound = 192, 6
    start = TEXT + sound
    cells = torch.cartesian_prod(*(torch.arange(n) for n in (3, 8, 8)))
    outside = torch.zeros(start, 3)
    return {
        "hidden_states": x(1, clip, 16),
        "audio_hidden_states": x(1, sound, 8),
        "encoder_hidden_states": x(1, TEXT, 16),
        "timestep": at(0.5, 0.0),
        "timestep_indices": torch.cat([torch.ones(TEXT), torch.zeros(sound + clip)]).long(),
        "token_tags": torch.tensor([0] * TEXT + [1] * sound + [2] * clip),
        "position_ids": torch.cat([outside, cells * 0.5]).double(),
        "video_indices": torch.arange(start, start + clip),
        "audio_indices": torch.arange(TEXT, start),
        "text_indices": torch.arange(TEXT),
    }


def ltx(**more):
    return dict(
        hidden_states=x(2, 192, 8),
        encoder_hidden_states=x(2, TEXT, 16),
        timestep=at(500.0, 500.0),
        encoder_attention_mask=padding(12, 20),
        num_frames=3,
        height=8,
        width=8,
        **more,
    )


VIDEOS = (
    Video(
        "LTXVideoTransformer3DModel",
        "LTX-Video",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "num_layers": 2,
            "caption_channels": 16,
        },
        ltx,
        axes="BNC",
    ),
    Video(
        "LTX2VideoTransformer3DModel",
        "LTX-2",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
        },
        lambda: ltx(
            audio_hidden_states=x(2, 6, 8),
            audio_encoder_hidden_states=x(2, TEXT, 16),
            audio_encoder_attention_mask=padding(12, 20),
            audio_num_frames=6,
        ),
        axes="BNC",
        note="audio and audio-video attention stay dense",
    ),
    Video(
        "MochiTransformer3DModel",
        "Mochi 1",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "max_sequence_length": TEXT,
        },
        lambda: {
            "hidden_states": x(2, 4, 3, 16, 16),
            "encoder_hidden_states": x(2, TEXT, 16),
            "timestep": at(500.0, 500.0),
            "encoder_attention_mask": padding(12, 20),
        },
        note="one attention call per sample",
    ),
    Video(
        "AllegroTransformer3DModel",
        "Allegro",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 48,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 96,
            "sample_width": 16,
            "sample_height": 16,
            "sample_frames": 3,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": x(2, 4, 3, 16, 16),
            "encoder_hidden_states": x(2, 1, TEXT, 16),
            "timestep": at(500.0, 500.0),
            "encoder_attention_mask": padding(12, 20).long(),
            "image_rotary_emb": allegro_rope(),
        },
    ),
    Video(
        "EasyAnimateTransformer3DModel",
        "EasyAnimate 5.1",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 16,
            "text_embed_dim": 16,
        },
        lambda: {
            "hidden_states": x(2, 4, 3, 16, 16),
            "timestep": at(500.0, 500.0),
            "encoder_hidden_states": x(2, TEXT, 16),
        },
    ),
    Video(
        "CosmosTransformer3DModel",
        "Cosmos 1, 2 and 2.5",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "num_layers": 2,
            "text_embed_dim": 32,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "concat_padding_mask": False,
        },
        lambda: {
            "hidden_states": x(1, 4, 3, 16, 16),
            "timestep": at(0.5),
            "encoder_hidden_states": x(1, TEXT, 32),
        },
    ),
    Video(
        "Kandinsky5Transformer3DModel",
        "Kandinsky 5",
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "time_dim": 32,
            "out_visual_dim": 4,
            "model_dim": 128,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (16, 24, 24),
        },
        lambda: {
            "hidden_states": x(1, 3, 16, 16, 4),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": at(500.0),
            "pooled_projections": x(1, 16),
            "visual_rope_pos": [at(*range(n)).long() for n in (3, 8, 8)],
            "text_rope_pos": at(*range(TEXT)).long(),
        },
        axes="BTHWC",
        note="checkpoints that bring their own NABLA mask stay dense",
    ),
    Video(
        "Kandinsky6Transformer3DModel",
        "Kandinsky 6",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "time_dim": 32,
            "model_dim": 128,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (16, 24, 24),
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
        },
        lambda: {
            "hidden_states": x(1, 3, 16, 16, 4),
            "audio_hidden_states": x(1, 6, 4),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": at(500.0),
            "pooled_projections": x(1, 16),
        },
        axes="BTHWC",
        note="audio and audio-video attention stay dense",
    ),
    Video(
        "JoyImageEditTransformer3DModel",
        "JoyImage Edit",
        JOY,
        lambda: {
            "hidden_states": x(2, 4, 3, 16, 16),
            "encoder_hidden_states": x(2, TEXT, 16),
            "timestep": at(500.0, 500.0),
        },
    ),
    Video(
        "JoyImageEditPlusTransformer3DModel",
        "JoyImage Edit Plus",
        JOY,
        lambda: {
            "hidden_states": x(2, 192, 4, 1, 2, 2),
            "encoder_hidden_states": x(2, TEXT, 16),
            "encoder_hidden_states_mask": padding(12, 20),
            "timestep": at(500.0, 500.0),
            "shape_list": [[(1, 8, 8)] * 3] * 2,
        },
        axes="BNC",
        mask="key padding",
        note="batches of several sizes stay dense",
    ),
    Video(
        "MiniMaxH3Transformer3DModel",
        "MiniMax H3",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "hidden_size": 96,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 64,
            "in_channels": 4,
            "audio_in_channels": 8,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 32,
            "rope_freq_dim": 8,
        },
        lambda: minimax(),
        axes="BNC",
        note="sound and reference images are read by every query",
    ),
    Video(
        "LatteTransformer3DModel",
        "Latte",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 128,
            "sample_size": 24,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 16,
            "video_length": 2,
        },
        lambda: {
            "hidden_states": x(1, 4, 2, 24, 24),
            "timestep": at(500.0),
            "encoder_hidden_states": x(1, TEXT, 16),
        },
        grid=(1, 12, 12),
        note="one frame at a time; its attention over time is short and stays dense",
    ),
)


def allegro_rope():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *angles, t, h, w = get_3d_rotary_pos_embed_allegro(
        embed_dim=48,
        crops_coords=((0, 0), (8, 8)),
        grid_size=(8, 8),
        temporal_size=3,
        interpolation_scale=(2.2, 2.0, 2.0),
        device="cpu",
    )
    cells = torch.cartesian_prod(t.long(), h.long(), w.long())
    return tuple(angles), tuple(cells.T[:, None])
