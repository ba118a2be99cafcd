"""Image transformers: 16 × 16 tokens, two heads of 64."""

from functools import partial

import torch
from zoo import TEXT, Case, at, image_ids, padding, x

Image = partial(Case, axes="BCHW", grid=(1, 16, 16))
Packed = partial(Case, axes="BNC", grid=(1, 16, 16))

DIT = {"num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 4, "num_layers": 2}
PACKED = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (16, 24, 24),
}
COG = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 4,
}


def latents(batch=2, size=32, dim=16, **more):
    return dict(
        hidden_states=x(batch, 4, size, size),
        encoder_hidden_states=x(batch, TEXT, dim),
        timestep=at(*[500.0] * batch),
        **more,
    )


def packed(axes=3, **more):
    return dict(
        hidden_states=x(1, 256, 16),
        encoder_hidden_states=x(1, TEXT, 16),
        timestep=at(0.5),
        img_ids=image_ids(16, 16, axes),
        txt_ids=x(TEXT, axes) * 0,
        **more,
    )


def cogview(**more):
    sizes = {"original_size": at(32, 32), "target_size": at(32, 32), "crop_coords": at(0, 0)}
    return latents(**{name: pair.expand(2, 2) for name, pair in sizes.items()}, **more)


def qwen(**more):
    return dict(
        hidden_states=x(2, 256, 16),
        encoder_hidden_states=x(2, TEXT, 16),
        encoder_hidden_states_mask=padding(12, 20),
        timestep=at(0.5, 0.5),
        img_shapes=[[(1, 16, 16)]] * 2,
        **more,
    )


IMAGES = (
    Packed(
        "FluxTransformer2DModel",
        "Flux.1, Kontext, Fill, Control",
        dict(PACKED, pooled_projection_dim=16),
        lambda: packed(pooled_projections=x(1, 16)),
    ),
    Packed(
        "Flux2Transformer2DModel",
        "Flux.2",
        dict(PACKED, axes_dims_rope=(16, 16, 16, 16), timestep_guidance_channels=32),
        lambda: packed(axes=4, guidance=at(1.0)),
        note="with a key-value cache for reference images it stays dense, unbooked",
    ),
    Packed(
        "ChromaTransformer2DModel",
        "Chroma",
        dict(
            PACKED,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        lambda: packed(attention_mask=padding(12 + 256, of=256 + TEXT).roll(8, 1)),
        mask="product of valid queries and valid keys",
        note="diffusers' own pipelines hand it an additive bias, which stays dense",
    ),
    Packed(
        "BriaTransformer2DModel",
        "Bria 3.2",
        PACKED,
        packed,
    ),
    Packed(
        "BriaFiboTransformer2DModel",
        "Bria Fibo",
        dict(PACKED, text_encoder_dim=16),
        lambda: packed(text_encoder_layers=[x(1, TEXT, 16), x(1, TEXT, 16)]),
    ),
    Packed("LongCatImageTransformer2DModel", "LongCat-Image", PACKED, packed),
    Packed("OvisImageTransformer2DModel", "Ovis-Image", PACKED, packed),
    Packed(
        "QwenImageTransformer2DModel",
        "Qwen-Image, Edit, Layered",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (16, 24, 24),
        },
        qwen,
        mask="key padding",
    ),
    Packed(
        "NucleusMoEImageTransformer2DModel",
        "NucleusMoE-Image",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (16, 24, 24),
            "moe_enabled": False,
            "capacity_factors": [1.0, 1.0],
        },
        qwen,
        mask="key padding",
    ),
    Packed(
        "Krea2Transformer2DModel",
        "Krea 2",
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (16, 24, 24),
        },
        lambda: {
            "hidden_states": x(1, 256, 16),
            "encoder_hidden_states": x(1, TEXT, 2, 16),
            "timestep": at(0.5),
            "position_ids": krea_ids(),
            "encoder_attention_mask": padding(12),
        },
        mask="key padding",
    ),
    Image(
        "SD3Transformer2DModel",
        "Stable Diffusion 3 and 3.5",
        dict(
            DIT,
            sample_size=32,
            patch_size=2,
            joint_attention_dim=16,
            caption_projection_dim=128,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=32,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        lambda: latents(pooled_projections=x(2, 16)),
        layers=3,
    ),
    Image(
        "AuraFlowTransformer2DModel",
        "AuraFlow",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 128,
            "out_channels": 4,
            "pos_embed_max_size": 256,
        },
        latents,
    ),
    Image(
        "HunyuanImageTransformer2DModel",
        "HunyuanImage 2.1",
        dict(
            DIT,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(2, 2),
            text_embed_dim=16,
            rope_axes_dim=(32, 32),
        ),
        lambda: latents(encoder_attention_mask=padding(12, 20)),
        mask="key padding",
    ),
    Image(
        "HunyuanDiT2DModel",
        "HunyuanDiT",
        dict(
            DIT,
            hidden_size=128,
            patch_size=2,
            sample_size=32,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=8,
            text_len=TEXT,
            text_len_t5=TEXT,
            use_style_cond_and_image_meta_size=False,
        ),
        lambda: latents(
            text_embedding_mask=padding(12, 20),
            encoder_hidden_states_t5=x(2, TEXT, 16),
            text_embedding_mask_t5=padding(12, 20),
            image_rotary_emb=(x(256, 64), x(256, 64)),
        ),
    ),
    Image(
        "PixArtTransformer2DModel",
        "PixArt-α and -Σ",
        dict(
            DIT,
            out_channels=8,
            sample_size=32,
            patch_size=2,
            cross_attention_dim=128,
            caption_channels=16,
            use_additional_conditions=False,
        ),
        lambda: latents(encoder_attention_mask=padding(12, 20)),
    ),
    Image(
        "DiTTransformer2DModel",
        "DiT",
        dict(DIT, sample_size=32, patch_size=2),
        lambda: {
            "hidden_states": x(2, 4, 32, 32),
            "timestep": at(500, 500),
            "class_labels": at(1, 2).long(),
        },
    ),
    Image(
        "CogView4Transformer2DModel",
        "CogView4",
        dict(COG, sample_size=32, pos_embed_max_size=32, rope_axes_dim=(32, 32)),
        cogview,
    ),
    Image(
        "CogView3PlusTransformer2DModel",
        "CogView3+",
        dict(COG, sample_size=32, pos_embed_max_size=32),
        cogview,
    ),
    Image(
        "GlmImageTransformer2DModel",
        "GLM-Image",
        dict(COG, prior_vq_quantizer_codebook_size=8),
        lambda: {
            **{k: v for k, v in cogview().items() if k != "original_size"},
            "prior_token_id": at(*[1.0] * 512).long().view(2, 256),
            "prior_token_drop": at(0, 1).bool(),
        },
    ),
    Image(
        "ErnieImageTransformer2DModel",
        "ERNIE-Image",
        {
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "text_in_dim": 16,
            "rope_axes_dim": (16, 24, 24),
        },
        lambda: {
            "hidden_states": x(2, 4, 32, 32),
            "timestep": at(500.0, 500.0),
            "text_bth": x(2, TEXT, 16),
            "text_lens": at(12, 20).long(),
        },
        mask="key padding",
    ),
    Image(
        "PRXTransformer2DModel",
        "PRX",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 128,
            "mlp_ratio": 1.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [32, 32],
        },
        lambda: latents(attention_mask=padding(12, 20)),
        mask="key padding",
    ),
    Image(
        "Lumina2Transformer2DModel",
        "Lumina Image 2.0",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 128,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (16, 24, 24),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 16,
        },
        lambda: latents(encoder_attention_mask=padding(12, 12)),
        mixes=True,
        note="a batch whose prompts differ in length stays dense",
    ),
    Image(
        "HiDreamImageTransformer2DModel",
        "HiDream-I1",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "caption_channels": [16, 16],
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (16, 24, 24),
            "max_resolution": (32, 32),
            "llama_layers": [0, 1],
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": x(2, 4, 32, 32),
            "timesteps": at(500.0, 500.0),
            "encoder_hidden_states_t5": x(2, TEXT, 16),
            "encoder_hidden_states_llama3": x(2, 2, TEXT, 16),
            "pooled_embeds": x(2, 16),
        },
        note="images that are no square are padded and keep raster order",
    ),
    Image(
        "ZImageTransformer2DModel",
        "Z-Image",
        {
            "in_channels": 4,
            "dim": 128,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [16, 24, 24],
            "axes_lens": [512, 64, 64],
        },
        lambda: {
            "x": [x(4, 1, 32, 32), x(4, 1, 32, 32)],
            "t": at(0.5, 0.5),
            "cap_feats": [x(12, 16), x(40, 16)],
        },
        mask="key padding",
        axes="CTHW",
        mixes=True,
        note="reference images and batches of several sizes stay dense",
    ),
)


def krea_ids():
    return torch.cat([torch.zeros(TEXT, 3), image_ids(16, 16)])
