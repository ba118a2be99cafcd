"""What pipelines of clips want beside what all are made of and given."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.pipelines.ltx2 import pipeline_ltx2_condition as ltx_condition
from diffusers.pipelines.ltx2 import pipeline_ltx2_hdr_lora as ltx_hdr
from diffusers.pipelines.ltx2 import pipeline_ltx2_ic_lora as ltx_context
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from own import CLIP, PICTURE, Own, told
from stand_ins import AudioVae, Transforms, Vae
from torch import nn
from zoo import TEXT, padding, x


def vae(channels: int) -> Any:
    return lambda transformer: {"vae": Vae(channels, True)}


def karras(transformer: nn.Module) -> dict[str, Any]:
    """The scheduler of Cosmos 2: with another one its first step divides by zero."""
    return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}


def helios(pyramid: bool, transformer: nn.Module) -> dict[str, Any]:
    """A gamma of 1/3 makes the noise of a pyramid's blocks singular in float32."""
    more = {"gamma": 0.25} if pyramid else {"stages": 1}
    return {"scheduler": diffusers.HeliosScheduler(**more)}


def ltx2(transformer: nn.Module) -> dict[str, Any]:
    """Connectors of one layer, and a VAE for what is conditioned on."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    sizes["num_learnable_registers"] = None
    given = {
        f"{kind}_connector_{name}": n for kind in ("video", "audio") for name, n in sizes.items()
    }
    connectors = LTX2TextConnectors(caption_channels=16, text_proj_in_factor=1, **given).eval()
    return {"connectors": connectors, "vae": Vae(8, True), "audio_vae": AudioVae()}


def refined(transformer: nn.Module) -> dict[str, Any]:
    torch.manual_seed(0)
    more = LTX2LatentUpsamplerModel(
        in_channels=8,
        mid_channels=32,
        num_blocks_per_stage=1,
        spatial_upsample=False,
        temporal_upsample=True,
    ).eval()
    noisy = diffusers.LTXEulerAncestralRFScheduler(eta=1.0)
    return {**ltx2(transformer), "temporal_latent_upsampler": more, "scheduler": noisy}


def transfer(transformer: nn.Module) -> dict[str, Any]:
    """Cosmos 2.5's control net; it resizes by torchvision where there is one."""
    if not hasattr(controlnet_cosmos, "transforms"):
        controlnet_cosmos.transforms = Transforms
    torch.manual_seed(0)
    same = ("num_attention_heads", "attention_head_dim", "text_embed_dim", "adaln_lora_dim")
    sizes = {name: transformer.config[name] for name in (*same, "max_size")}
    net = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=6, latent_channels=6, model_channels=128, **sizes
    ).eval()
    return {"controlnet": net, "vae": Vae(4, True)}


def condition(kind: type, frames: Any, **more: Any) -> list[Any]:
    return [kind(frames=frames, **more)]


def easy_text(**rest: Any) -> tuple[torch.Tensor, ...]:
    return told(1, TEXT, 16), told(1, TEXT, 16, seed=1), padding(12), padding(9)


def pixels(value: float = 0.5) -> torch.Tensor:
    return torch.full((1, 3, 9, 128, 128), value)


COSMOS = {"in_channels": 5, "out_channels": 4}
SEES = {"encode_image": lambda *rest: told(1, 5, 16)}
SEEN = {"image_dim": 16, "added_kv_proj_dim": 128, "in_channels": 36}
HELIOS = {"num_latent_frames_per_chunk": 5, "num_frames": 17}
AUDIO = {"audio_in_channels": 128, "audio_out_channels": 128}
KEYFRAMES = AUDIO | {"use_keyframes_abs_pos_embedding": True}

OWN = {
    "HeliosPipeline": Own(parts=partial(helios, False), given=lambda: HELIOS),
    "HeliosPyramidPipeline": Own(
        parts=partial(helios, True),
        given=lambda: HELIOS | {"pyramid_num_inference_steps_list": [1, 1, 1]},
    ),
    "LTXI2VLongMultiPromptPipeline": Own(
        given=lambda: {
            "prompt": "a",
            "temporal_tile_size": 16,
            "temporal_overlap": 8,
            "num_frames": 17,
        },
        sets={"encode_prompt": lambda **rest: (told(1, TEXT, 16), padding(12), None, None)},
    ),
    "HunyuanVideo15Pipeline": Own(
        config={"in_channels": 9, "text_embed_2_dim": 16},
    ),
    "HunyuanVideo15ImageToVideoPipeline": Own(
        config={"in_channels": 9, "text_embed_2_dim": 16, "image_embed_dim": 8},
        sets={"encode_image": lambda **rest: told(1, 3, 8), "target_size": 128},
    ),
    "MotifVideoImage2VideoPipeline": Own(config={"in_channels": 9}),
    "CogVideoXFunControlPipeline": Own(
        config={"in_channels": 8}, given=lambda: {"control_video": CLIP}
    ),
    "CogVideoXImageToVideoPipeline": Own(config={"in_channels": 8}),
    "EasyAnimateControlPipeline": Own(
        config={"in_channels": 12},
        given=lambda: {"control_video": pixels()},
        sets={"encode_prompt": easy_text},
    ),
    "EasyAnimateInpaintPipeline": Own(
        config={"in_channels": 9, "resize_inpaint_mask_directly": True},
        given=lambda: {"video": pixels(), "mask_video": pixels(255.0)[:, :1]},
    ),
    "HunyuanSkyreelsImageToVideoPipeline": Own(config={"in_channels": 8}),
    "HunyuanVideoImageToVideoPipeline": Own(
        config={"in_channels": 9, "image_condition_type": "latent_concat"}, parts=vae(4)
    ),
    "HunyuanVideoFramepackPipeline": Own(
        given=lambda: {"latent_window_size": 3, "num_frames": 9},
        sets={"encode_image": lambda *rest, **more: told(1, 5, 16)},
    ),
    "Kandinsky5I2VPipeline": Own(
        config={"visual_cond": True}, parts=vae(4), given=lambda: {"num_frames": 25}
    ),
    "Kandinsky6TI2VAPipeline": Own(
        config={"visual_cond": True, "visual_token_type_num_embeddings": 2},
        parts=vae(4),
        given=lambda: {"sample_audio": False},
    ),
    "AllegroPipeline": Own(
        given=lambda: {"prompt_embeds": x(1, TEXT, 16), "negative_prompt_embeds": x(1, TEXT, 16)}
    ),
    "LattePipeline": Own(config={"out_channels": 8}, given=lambda: {"video_length": 2}),
    "Cosmos2TextToImagePipeline": Own(parts=karras),
    "Cosmos2VideoToWorldPipeline": Own(
        config=COSMOS, parts=karras, given=lambda: {"image": PICTURE}
    ),
    "CosmosVideoToWorldPipeline": Own(config=COSMOS, given=lambda: {"image": PICTURE}),
    "Cosmos2_5_PredictBasePipeline": Own(
        config=COSMOS, parts=vae(4), given=lambda: {"video": CLIP}
    ),
    "Cosmos2_5_TransferPipeline": Own(
        config=COSMOS | {"controlnet_block_every_n": 1},
        parts=transfer,
        given=lambda: {"controls": CLIP, "num_frames_per_chunk": 9},
    ),
    "WanAnimatePipeline": Own(
        config={"image_dim": 16},
        given=lambda: {
            "image": PICTURE,
            "pose_video": CLIP,
            "face_video": CLIP,
            "segment_frame_length": 9,
        },
        sets=SEES,
    ),
    "SkyReelsV2ImageToVideoPipeline": Own(config=SEEN, sets=SEES),
    "ChronoEditPipeline": Own(config=SEEN, sets=SEES),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Own(
        given=lambda: {"overlap_history": 5, "base_num_frames": 9, "num_frames": 13}
    ),
    "ConsisIDPipeline": Own(
        config={"in_channels": 8},
        given=lambda: {
            "image": PICTURE,
            "id_vit_hidden": [told(2, 7, 16)] * 5,
            "id_cond": told(2, 16),
        },
    ),
    "LTX2Pipeline": Own(config=AUDIO, parts=ltx2),
    "LTX2ImageToVideoPipeline": Own(config=AUDIO, parts=ltx2, given=lambda: {"image_crf": 0}),
    "LTX2ConditionPipeline": Own(
        config=AUDIO,
        parts=ltx2,
        given=lambda: {
            "conditions": [
                ltx_condition.LTX2VideoCondition(frames=PICTURE, index=i, crf=0) for i in (0, -1)
            ]
        },
    ),
    "LTX2InContextPipeline": Own(
        config=AUDIO,
        parts=ltx2,
        given=lambda: {"reference_conditions": condition(ltx_context.LTX2ReferenceCondition, CLIP)},
    ),
    "LTX2HDRPipeline": Own(
        config=AUDIO,
        parts=ltx2,
        given=lambda: {"reference_conditions": condition(ltx_hdr.LTX2HDRReferenceCondition, CLIP)},
    ),
    "LTX2DFRPipeline": Own(
        config=KEYFRAMES, parts=ltx2, given=lambda: {"sigmas": [1.0, 0.5], "num_frames": 9}
    ),
    "LTX2DFRTemporalRefinePipeline": Own(
        config=KEYFRAMES,
        parts=refined,
        given=lambda: {
            "latents": told(1, 8, 3, 16, 16),
            "keyframes_latents": told(1, 8, 1, 16, 16),
            "keyframe_positions": [8],
            "audio_latents": told(1, 8, 10, 16),
            "num_frames": 9,
            "sigmas": [1.0, 0.5],
        },
    ),
}
