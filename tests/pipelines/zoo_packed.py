"""Image transformers on packed tokens: 16 × 16 of them, two heads of 64."""

import torch
from zoo import TEXT, Packed, at, image_ids, padding, x

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


def packed(axes=3, **more):
    return dict(
        hidden_states=x(1, 256, 16),
        encoder_hidden_states=x(1, TEXT, 16),
        timestep=at(0.5),
        img_ids=image_ids(16, 16, axes),
        txt_ids=x(TEXT, axes) * 0,
        **more,
    )


def qwen(**more):
    return dict(
        hidden_states=x(2, 256, 16),
        encoder_hidden_states=x(2, TEXT, 16),
        encoder_hidden_states_mask=padding(12, 20),
        timestep=at(0.5, 0.5),
        img_shapes=[[(1, 16, 16)]] * 2,
        **more,
    )


def qwen21():
    return {
        "hidden_states": x(2, 256, 16),
        "encoder_hidden_states": x(2, TEXT, 16),
        "encoder_hidden_states_mask": padding(12, 20),
        "timestep": at(0.5, 0.5),
        "img_shapes": [[(1, 16, 16)]] * 2,
        "img_mask": (torch.arange(TEXT + 64) >= TEXT).expand(2, -1),
    }


def krea_ids():
    return torch.cat([torch.zeros(TEXT, 3), image_ids(16, 16)])


def ideogram():
    """Text that is padded in front, then the picture."""
    text, n = padding(12, 20).flip(1), TEXT + 256
    picture = torch.ones(2, 256).bool()
    positions = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), image_ids(16, 16).long() + 9])
    return {
        "hidden_states": x(2, n, 16),
        "encoder_hidden_states": x(2, n, 16),
        "timestep": at(0.5, 0.5),
        "position_ids": positions.expand(2, -1, -1),
        "segment_ids": torch.cat([text, picture], dim=1) * 2 - 1,
        "indicator": torch.cat([text * 3, picture * 2], dim=1),
    }


PACKS = (
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
        "Flux3Transformer2DModel",
        "Flux.3",
        {
            "in_channels": 16,
            "cond_in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "timestep_channels": 16,
            "mlp_ratio": 1.0,
            "axes_dims_rope": (16, 16, 16, 16),
        },
        lambda: packed(axes=4),
        layers=3,
        note="with reference images its first blocks stay dense; pruning spans the joint blocks",
    ),
    Packed(
        "Ideogram4Transformer2DModel",
        "Ideogram 4",
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 16,
            "mrope_section": (12, 10, 10),
        },
        ideogram,
        ahead=TEXT,
        mask="product of valid queries and valid keys",
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
        "QwenImage21Transformer2DModel",
        "Qwen-Image 2.1",
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (16, 24, 24),
        },
        qwen21,
        mask="key padding",
        note="text and reference images attend causally, dense and unbooked",
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
        note="pruned, its experts choose among the tokens that run",
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
)
