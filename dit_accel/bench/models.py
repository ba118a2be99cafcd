"""Video and image models at their published sizes with random weights, in their stock pipelines.

The numbers are those of each checkpoint's transformer/config.json; text encoder and VAE are left
out, prompt embeddings of the right shape take their place.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.machine import free_bytes

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@dataclass(frozen=True)
class Model:
    """One checkpoint's transformer, and the call of its pipeline that is timed.

    Args:
        name, title: on the command line, and in tables.
        pipeline, transformer: names of diffusers classes.
        config: what differs from the transformer class's defaults.
        size: the call's height, width and, for video, frames.
        text: tokens of the prompt.
        embeds: call argument → name of the transformer's option that gives its width; "-" before
            the name: one vector, not one for each token.
        call: further arguments of the call.
        scheduler: name of a diffusers class, and its arguments.
        masks: call arguments that mark a quarter of the prompt's tokens as valid.
        passes: transformer forwards of a step in the pipeline's usual call.
        timed: how many of them run here; a step's seconds are scaled to all (the forwards differ in
            the text alone).
        attributes: set on the pipeline, as its VAE would.
        pipeline_config: further options of the pipeline.
        tiny: replaces `config`, `size` and `text` where only the path is to be tried.
    """

    name: str
    title: str
    pipeline: str
    transformer: str
    config: dict[str, Any]
    size: tuple[int, ...]
    text: int
    embeds: dict[str, str]
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: tuple[str, dict[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    masks: tuple[str, ...] = ()
    passes: int = 1
    timed: int = 1
    attributes: dict[str, int] = field(default_factory=dict)
    pipeline_config: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.timed <= self.passes or len(self.size) not in (2, 3):
            raise ValueError(f"a model is timed in 1 to `passes` forwards at 2 or 3 sizes: {self}")


PAIR = {"prompt_embeds": "text_dim", "negative_prompt_embeds": "text_dim"}
ONE = {"prompt_embeds": "text_dim"}


def _wan(name: str, title: str, small: int = 128, **options: Any) -> Model:
    tiny = {
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "num_layers": 3,
        "text_dim": 32,
        "freq_dim": 32,
    }
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    shift = 3.0 if "480p" in name else 5.0
    return Model(
        name,
        title,
        "WanPipeline",
        "WanTransformer3DModel",
        scheduler=("UniPCMultistepScheduler", {**flow, "flow_shift": shift}),
        text=512,
        passes=2,
        tiny={"config": tiny, "size": (small, small, 9), "text": 20},
        **options,
    )


def _joint(text: str = "joint_attention_dim", **more: str) -> dict[str, str]:
    return {"prompt_embeds": text, **more}


_POOLED = {"pooled_prompt_embeds": "-pooled_projection_dim"}
_SMALL = {"num_attention_heads": 2, "num_layers": 3}

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _wan(
            "wan1.3b-480p",
            "Wan2.1 1.3B, 832 × 480, 81 frames",
            config={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
            size=(480, 832, 81),
            embeds=PAIR,
            call={"guidance_scale": 5.0},
            timed=2,
        ),
        _wan(
            "wan14b-720p",
            "Wan2.1 14B, 1280 × 720, 81 frames",
            config={"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
            size=(720, 1280, 81),
            embeds=ONE,
            call={"guidance_scale": 1.0},
        ),
        Model(
            "hunyuan-720p",
            "HunyuanVideo, 1280 × 720, 129 frames",
            "HunyuanVideoPipeline",
            "HunyuanVideoTransformer3DModel",
            {},
            (720, 1280, 129),
            256,
            _joint("text_embed_dim", **_POOLED),
            masks=("prompt_attention_mask",),
            scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
            tiny={
                "config": {
                    **_SMALL,
                    "num_layers": 2,
                    "num_single_layers": 2,
                    "num_refiner_layers": 1,
                    "text_embed_dim": 32,
                    "pooled_projection_dim": 32,
                },
                "size": (128, 128, 9),
                "text": 20,
            },
        ),
        Model(
            "cogvideox-5b",
            "CogVideoX 5B, 720 × 480, 49 frames",
            "CogVideoXPipeline",
            "CogVideoXTransformer3DModel",
            {
                "num_attention_heads": 48,
                "num_layers": 42,
                "use_rotary_positional_embeddings": True,
            },
            (480, 720, 49),
            226,
            dict.fromkeys(PAIR, "text_embed_dim"),
            {"guidance_scale": 6.0},
            ("CogVideoXDDIMScheduler", {}),
            tiny={
                "config": {**_SMALL, "time_embed_dim": 32, "text_embed_dim": 32},
                "size": (128, 128, 9),
                "text": 20,
            },
        ),
        Model(
            "ltx-512p",
            "LTX-Video 2B, 768 × 512, 121 frames",
            "LTXPipeline",
            "LTXVideoTransformer3DModel",
            {},
            (512, 768, 121),
            128,
            dict.fromkeys(PAIR, "caption_channels"),
            {"guidance_scale": 3.0},
            masks=("prompt_attention_mask", "negative_prompt_attention_mask"),
            tiny={
                "config": {**_SMALL, "cross_attention_dim": 128, "caption_channels": 32},
                "size": (256, 256, 17),
                "text": 20,
            },
        ),
        _wan(
            "wan2.2-5b-720p",
            "Wan2.2 5B, 1280 × 704, 121 frames",
            config={
                "num_attention_heads": 24,
                "ffn_dim": 14336,
                "num_layers": 30,
                "in_channels": 48,
                "out_channels": 48,
            },
            size=(704, 1280, 121),
            embeds=PAIR,
            call={"guidance_scale": 5.0},
            timed=2,
            attributes={"vae_scale_factor_spatial": 16},
            small=256,
            pipeline_config={"expand_timesteps": True},
        ),
        Model(
            "flux-1024",
            "Flux.1 dev, 1024 × 1024",
            "FluxPipeline",
            "FluxTransformer2DModel",
            {"guidance_embeds": True},
            (1024, 1024),
            512,
            _joint(**_POOLED),
            {"guidance_scale": 3.5},
            tiny={
                "config": {
                    **_SMALL,
                    "num_layers": 2,
                    "num_single_layers": 2,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": 32,
                },
                "size": (256, 256),
                "text": 20,
            },
        ),
        Model(
            "sd3.5-1024",
            "Stable Diffusion 3.5 large, 1024 × 1024",
            "StableDiffusion3Pipeline",
            "SD3Transformer2DModel",
            {
                "num_attention_heads": 38,
                "num_layers": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            (1024, 1024),
            333,
            {
                **dict.fromkeys(PAIR, "joint_attention_dim"),
                "pooled_prompt_embeds": "-pooled_projection_dim",
                "negative_pooled_prompt_embeds": "-pooled_projection_dim",
            },
            {"guidance_scale": 4.5},
            tiny={
                "config": {
                    **_SMALL,
                    "caption_projection_dim": 128,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": 32,
                },
                "size": (256, 256),
                "text": 20,
            },
        ),
        Model(
            "qwen-1328",
            "Qwen-Image 20B, 1328 × 1328",
            "QwenImagePipeline",
            "QwenImageTransformer2DModel",
            {},
            (1328, 1328),
            64,
            dict.fromkeys(PAIR, "joint_attention_dim"),
            {"true_cfg_scale": 4.0},
            passes=2,
            timed=2,
            tiny={
                "config": {**_SMALL, "joint_attention_dim": 32},
                "size": (256, 256),
                "text": 20,
            },
        ),
    )
}


class TooLarge(RuntimeError):
    """The weights do not fit in the memory that is free."""


def find(name: str) -> Model:
    """The model of this name; ValueError says which there are."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the benchmark has {', '.join(MODELS)}")
    return MODELS[name]


def build(
    model: Model, device: torch.device, dtype: torch.dtype, tiny: bool = False
) -> DiffusionPipeline:
    """The pipeline with random weights on `device`, as `from_pretrained(torch_dtype=dtype)` has it.

    Raises TooLarge before anything is allocated.
    """
    import diffusers
    from accelerate import init_empty_weights

    kind = getattr(diffusers, model.transformer)
    config = {**model.config, **(model.tiny["config"] if tiny else {})}
    with init_empty_weights(include_buffers=False):
        transformer = kind(**config)
    need = sum(p.numel() for p in transformer.parameters()) * dtype.itemsize
    free = free_bytes(device)
    if free is not None and need > 0.9 * free:
        raise TooLarge(
            f"its weights take {need / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} GiB free"
        )
    _fill(transformer, device, dtype)
    transformer.eval()
    pipeline = getattr(diffusers, model.pipeline)
    name, options = model.scheduler
    parts = {"transformer": transformer, "scheduler": getattr(diffusers, name)(**options)}
    for name in inspect.signature(pipeline.__init__).parameters:
        if name.startswith(("vae", "text_encoder", "tokenizer")):
            parts[name] = None
    pipe = pipeline(**parts, **model.pipeline_config)
    for name, value in model.attributes.items():
        setattr(pipe, name, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _fill(transformer: ModelMixin, device: torch.device, dtype: torch.dtype) -> None:
    """Small normal weights, norms of one, biases of zero: finite through any number of layers."""
    generator = torch.Generator(device).manual_seed(0)
    wide: set[str] = set(transformer._keep_in_fp32_modules or ())
    for name, old in list(transformer.named_parameters()):
        here = torch.float32 if wide & set(name.split(".")) else dtype
        new = torch.empty(old.shape, dtype=here, device=device)
        if new.ndim > 1:
            new.normal_(std=0.02, generator=generator)
        else:
            new.fill_(float(name.endswith("weight")))
        owner, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(owner), leaf, nn.Parameter(new, requires_grad=False))
    for module in transformer.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def inputs(
    model: Model, pipe: DiffusionPipeline, device: torch.device, tiny: bool = False
) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call, but for steps and callback."""
    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    size, text = (model.tiny["size"], model.tiny["text"]) if tiny else (model.size, model.text)
    generator = torch.Generator(device).manual_seed(0)

    def embed(option: str) -> torch.Tensor:
        width = config[option.removeprefix("-")]
        shape = (1, width) if option.startswith("-") else (1, text, width)
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    mask = (torch.arange(text, device=device) < text // 4).long()[None]
    return {
        **dict(zip(("height", "width", "num_frames"), size, strict=False)),
        **{name: embed(option) for name, option in model.embeds.items()},
        **dict.fromkeys(model.masks, mask),
        **model.call,
        "generator": generator,
        "output_type": "latent",
    }
