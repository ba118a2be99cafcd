"""What pipelines of pictures want beside what all are made of and given."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from own import PICTURE, Own, told
from stand_ins import Processor, Safe, Vae
from torch import nn
from zoo import TEXT, padding, x, zoo

DISTILLED = {"guidance_scale": 1.0}


def flow(transformer: nn.Module) -> dict[str, Any]:
    return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


def unguided(transformer: nn.Module) -> dict[str, Any]:
    """Chroma's checkpoints say this in their config; the class does not know it."""
    transformer.register_to_config(guidance_embeds=False)
    return {}


def z_control(transformer: nn.Module, channels: int = 4) -> dict[str, Any]:
    """A control net that takes the embedders and refiners of the transformer."""
    sizes = {name: transformer.config[name] for name in ("dim", "n_heads", "n_kv_heads")}
    places = {"control_layers_places": [0], "control_refiner_layers_places": [0]}
    net = diffusers.ZImageControlNetModel(
        **sizes, **places, control_in_dim=channels, n_refiner_layers=1
    ).eval()
    return {"controlnet": net}


def second_ideogram(transformer: nn.Module) -> dict[str, Any]:
    return {"unconditional_transformer": zoo()["Ideogram4Transformer2DModel"].build()}


def ideogram_text(prompt: str, grid_h: int, grid_w: int, **rest: Any) -> tuple[torch.Tensor, ...]:
    """Text of which the first 8 tokens are padding, then the picture."""
    picture = torch.cartesian_prod(torch.tensor([0]), torch.arange(grid_h), torch.arange(grid_w))
    positions = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), picture + TEXT])[None]
    valid = torch.cat([padding(12).flip(1), torch.ones(1, len(picture)).bool()], dim=1)
    kinds = torch.cat([padding(12).flip(1) * 3, torch.full((1, len(picture)), 2)], dim=1)
    features = told(1, TEXT + len(picture), 16)
    features[:, TEXT:] = 0
    return features, positions, valid * 2 - 1, kinds


def fibo_text(prompt: str, **rest: Any) -> tuple[Any, ...]:
    layers = [told(1, TEXT, 16, seed=i) for i in range(2)]
    ids, valid = torch.zeros(TEXT, 3), torch.ones(1, TEXT)
    return (
        told(1, TEXT, 16),
        told(1, TEXT, 16, seed=9),
        ids,
        valid,
        padding(9).float(),
        layers,
        layers,
    )


def cloze_text(*rest: Any, **more: Any) -> tuple[torch.Tensor, ...]:
    return told(1, TEXT, 16), told(1, 16), torch.zeros(TEXT, 3)


def longcat_text(**rest: Any) -> tuple[torch.Tensor, ...]:
    return told(1, TEXT, 16), torch.zeros(TEXT, 3)


def joy_text(**rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return told(1, TEXT, 16), padding(12)


CLOZE = Own(
    config={"in_channels": 288, "out_channels": 16},
    parts=lambda transformer: {"resolution": 64, "vae": Vae(4, False)},
    given=lambda: {
        "task_prompt": "a",
        "content_prompt": "b",
        "image": [[PICTURE, PICTURE], [PICTURE, None]],
        "upsampling_height": 128,
        "upsampling_width": 128,
    },
    without=("prompt_embeds", "pooled_prompt_embeds"),
)

OWN = {
    "ChromaInpaintPipeline": Own(parts=unguided),
    "HunyuanDiTControlNetPipeline": Own(controlnet={"transformer_num_layers": 1}),
    "StableDiffusion3ControlNetInpaintingPipeline": Own(
        controlnet={"extra_conditioning_channels": 1}
    ),
    "QwenImageControlNetInpaintPipeline": Own(controlnet={"extra_condition_channels": 4}),
    "ZImageControlNetPipeline": Own(parts=z_control),
    "ZImageControlNetInpaintPipeline": Own(parts=partial(z_control, channels=9)),
    "ZImageOmniPipeline": Own(
        given=lambda: {"prompt_embeds": [[x(12, 16)]], "negative_prompt_embeds": [[x(5, 16)]]}
    ),
    "Ideogram4Pipeline": Own(
        parts=second_ideogram,
        given=lambda: {
            "prompt": "a rocket",
            "max_sequence_length": TEXT,
            "guidance_scale": 3.0,
            "guidance_schedule": None,
        },
        sets={"encode_prompt": ideogram_text},
    ),
    "BriaFiboPipeline": Own(
        parts=flow, given=lambda: {"prompt": "a"}, sets={"encode_prompt": fibo_text}
    ),
    "BriaFiboEditPipeline": Own(
        parts=lambda transformer: {**flow(transformer), "vae": Vae(16, False)},
        given=lambda: {"prompt": {"edit_instruction": "a"}},
        sets={"encode_prompt": fibo_text},
    ),
    "LongCatImagePipeline": Own(
        config={"in_channels": 64},
        given=lambda: {"enable_prompt_rewrite": False, "prompt": "a"},
        without=("prompt_embeds", "negative_prompt_embeds"),
        sets={"encode_prompt": longcat_text},
    ),
    "LongCatImageEditPipeline": Own(
        config={"in_channels": 64},
        parts=lambda transformer: {"text_processor": Processor(), "vae": Vae(16, False)},
        given=lambda: {"prompt": "a"},
        without=("prompt_embeds", "negative_prompt_embeds"),
        sets={"encode_prompt": longcat_text},
    ),
    "VisualClozeGenerationPipeline": replace(CLOZE, sets={"encode_prompt": cloze_text}),
    "VisualClozePipeline": replace(
        CLOZE,
        sets={
            "generation_pipe.encode_prompt": cloze_text,
            "upsampling_pipe.encode_prompt": cloze_text,
        },
    ),
    "HiDreamImagePipeline": Own(
        given=lambda: {
            "prompt_embeds_t5": x(1, TEXT, 16),
            "negative_prompt_embeds_t5": x(1, TEXT, 16),
            "prompt_embeds_llama3": x(2, 1, TEXT, 16),
            "negative_prompt_embeds_llama3": x(2, 1, TEXT, 16),
        },
        sets={"default_sample_size": 16},
    ),
    "GlmImagePipeline": Own(
        given=lambda: {"prior_token_ids": torch.ones(1, 64).long()},
    ),
    "Kandinsky5I2IPipeline": Own(
        config={"visual_cond": True}, parts=lambda transformer: {"vae": Vae(4, False)}
    ),
    "DiTPipeline": Own(config={"out_channels": 8}, given=lambda: {"output_type": "pt"}),
    "QwenImageLayeredPipeline": Own(
        config={"use_additional_t_cond": True, "use_layer3d_rope": True},
        parts=lambda transformer: {"text_encoder": Safe()},
        given=lambda: {
            "image": PICTURE,
            "prompt": "a",
            "layers": 1,
            "resolution": 640,
            "output_type": "pt",
        },
    ),
    "HunyuanImageRefinerPipeline": Own(
        config={
            "in_channels": 8,
            "out_channels": 4,
            "patch_size": (1, 2, 2),
            "rope_axes_dim": (16, 24, 24),
            "guidance_embeds": True,
        },
        parts=lambda transformer: {"vae": Vae(2, False)},
    ),
    "JoyImageEditPlusPipeline": Own(
        given=lambda: {"images": [PICTURE], "prompt": "a"},
        without=("prompt_embeds", "negative_prompt_embeds"),
        sets={"encode_prompt_multiple_images": joy_text},
    ),
}
