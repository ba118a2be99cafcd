"""Any pipeline of diffusers, called once with tiny parts: what it is made of and given, by name.

What holds for most of them stands here, what one alone wants in own_*.py.

python tests/pipelines/drive.py             prints which run, and why the others do not
python tests/pipelines/drive.py PIPELINE    runs one, with its traceback
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any

import diffusers
import torch
from own import CLIP, PICTURE, Own
from own_image import OWN as OWN_IMAGES
from own_video import OWN as OWN_VIDEOS
from PIL import Image
from stand_ins import Processor, Safe, Vae
from torch import nn
from zoo import TEXT, padding, x, zoo

OWN = {**OWN_IMAGES, **OWN_VIDEOS}

# what a pipeline wants of its transformer that the zoo's does not have
CONFIG = {
    "WanImageToVideoPipeline": {"in_channels": 36},
    "LucyEditPipeline": {"in_channels": 32},
    "FluxControlPipeline": {"in_channels": 32, "out_channels": 16},
    "FluxControlImg2ImgPipeline": {"in_channels": 32, "out_channels": 16},
    "FluxControlInpaintPipeline": {"in_channels": 32, "out_channels": 16},
    "MotifVideoPipeline": {"in_channels": 9},
    "CogView4ControlPipeline": {"in_channels": 8},
    "HunyuanVideo15Pipeline": {"in_channels": 9},
    "WanVACEPipeline": {"vace_in_channels": 96},
    "FluxFillPipeline": {"in_channels": 288, "out_channels": 16},
    "StableDiffusion3InpaintPipeline": {"in_channels": 16, "out_channels": 16},
    "OvisImagePipeline": {"out_channels": 16},
}
SIDES = {"height": 128, "width": 128}
PICTURES = (
    "Img2Img",
    "Inpaint",
    "Control",
    "ImageToVideo",
    "I2V",
    "I2I",
    "Edit",
    "Fill",
    "Refiner",
)
DDIM = ("AllegroPipeline", "LattePipeline", "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline")
EMPTY = inspect.Parameter.empty
WITHOUT = inspect.Parameter("image", inspect.Parameter.KEYWORD_ONLY, default=None)
_FLOW = diffusers.FlowMatchEulerDiscreteScheduler


@cache
def pipelines() -> dict[str, str]:
    """Pipeline → the class of its transformer, for those whose transformer has an adapter."""
    from tables import known_pipelines

    return {pipe: model for model, pipes in known_pipelines().items() for pipe in pipes}


def kind_of(name: str) -> Any:
    """The class of a pipeline. Where diffusers misses a package, it exports another one that only
    says so; ConsisID needs OpenCV to find a face, which is given here."""
    if name == "ConsisIDPipeline":
        return importlib.import_module(
            "diffusers.pipelines.consisid.pipeline_consisid"
        ).ConsisIDPipeline
    return getattr(diffusers, name)


def perturb(model: nn.Module) -> None:
    """Let nothing be zero: what a control net adds would be."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


def parts(name: str) -> dict[str, Any]:
    """The tiny parts of a pipeline: its transformer, a scheduler, a VAE, and nothing else."""
    kind, case = kind_of(name), zoo()[pipelines()[name]]
    own = OWN.get(name, Own())
    case = replace(case, config={**case.config, **CONFIG.get(name, {}), **own.config})
    transformer, out = case.build(), {}
    given = own.parts(transformer)
    for part, parameter in inspect.signature(kind.__init__).parameters.items():
        said = str(parameter.annotation)
        if part == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if part in given:
            out[part] = given[part]
        elif part == "transformer":
            out[part] = transformer
        elif part.endswith("scheduler"):
            found = [n for n in dir(diffusers) if n.endswith("Scheduler") and n in said]
            kind = getattr(diffusers, max(found, key=len)) if found else _FLOW
            out[part] = diffusers.DDIMScheduler() if "Karras" in said or name in DDIM else kind()
        elif part == "vae":
            config = transformer.config
            channels = config.get("out_channels") or config.get("in_channels") or 16
            packed = case.axes == "BNC" and channels > 4 and "LTX" not in name
            channels //= 4 if packed else 1
            out[part] = Vae(channels, "Video" in name)
        elif part == "guider":
            out[part] = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
        elif part == "controlnet":
            found = [n for n in dir(diffusers) if n.endswith("ControlNetModel") and n in said]
            model = getattr(diffusers, max((n for n in found if "Multi" not in n), key=len))
            out[part] = model.from_config({**transformer.config, **own.controlnet}).eval()
            perturb(out[part])
        elif part == "safety_checker" and "Cosmos" in name:
            out[part] = Safe()
        elif part == "processor" and name == "QwenImage21Pipeline":
            out[part] = Processor()
        elif parameter.default is inspect.Parameter.empty:
            out[part] = None
    return out


def arguments(name: str) -> dict[str, Any]:
    """What the call is given: embeddings of a prompt, masks, sizes, pictures where it needs any."""
    kind, case = kind_of(name), zoo()[pipelines()[name]]
    inputs, taken = case.arguments(), inspect.signature(kind.__call__).parameters
    text = inputs.get("encoder_hidden_states", torch.zeros(1, TEXT, 16))
    text = text[0] if isinstance(text, (list, tuple)) else text
    width = text.shape[-1]
    pooled = next((inputs[n].shape[-1] for n in ("pooled_projections",) if n in inputs), 16)
    shape = text.shape[1:] if text.ndim == 4 else (TEXT, width)
    given = {
        "prompt_embeds": x(1, *shape),
        "negative_prompt_embeds": x(1, *shape),
        "pooled_prompt_embeds": x(1, pooled),
        "negative_pooled_prompt_embeds": x(1, pooled),
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        "use_resolution_binning": False,
        "num_frames": 9,
        "strength": 1.0,
        **SIDES,
    }
    for mask in ("prompt_attention_mask", "prompt_embeds_mask"):
        given[mask], given[f"negative_{mask}"] = padding(TEXT), padding(TEXT)
    if "ZImage" in name:
        given |= {"prompt_embeds": [x(12, width)], "negative_prompt_embeds": [x(5, width)]}
    for again in [n for n in given if "embeds" in n]:
        given[f"{again}_2"] = given[again]
    for again in ("prompt_attention_mask", "prompt_embeds_mask"):
        given |= {f"{again}_2": padding(TEXT), f"negative_{again}_2": padding(TEXT)}
    if any(word in name for word in PICTURES) or taken.get("image", WITHOUT).default is EMPTY:
        given |= {"image": PICTURE, "control_image": PICTURE}
    given |= {"mask_image": Image.new("L", (128, 128), 255)}
    if "VideoToVideo" in name or taken.get("video", WITHOUT).default is EMPTY:
        given["video"] = CLIP
    if taken.get("prompt", WITHOUT).default is EMPTY:
        given["prompt"] = None
    if "Helios" in name:
        given["num_frames"] = 33
    given |= {
        "prompt_embeds_qwen": x(1, TEXT, width),
        "negative_prompt_embeds_qwen": x(1, 9, width),
    }
    given |= {f"{n}prompt_embeds_clip": x(1, pooled) for n in ("", "negative_")}
    given |= {"prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32)}
    given |= {"negative_prompt_cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}
    given |= {"class_labels": [1], "control_mask": Image.new("L", (128, 128), 255)}
    if "negative_prompt" in taken and taken["negative_prompt"].default == "":
        given["negative_prompt"] = None
    own = OWN.get(name, Own())
    given |= own.given()
    return {key: value for key, value in given.items() if key in taken and key not in own.without}


def build(name: str) -> Any:
    pipe = kind_of(name)(**parts(name))
    pipe.set_progress_bar_config(disable=True)
    for attribute, value in OWN.get(name, Own()).sets.items():
        *inside, last = attribute.split(".")
        setattr(attrgetter(".".join(inside))(pipe) if inside else pipe, last, value)
    return pipe


def run(pipe: Any, name: str) -> torch.Tensor:
    """The latents of one call."""
    torch.manual_seed(0)
    with torch.no_grad():
        out = pipe(**arguments(name))
    out = out[0] if isinstance(out, (tuple, list)) else next(iter(out.values()))
    return out[0] if isinstance(out, (list, tuple)) else out


def why_not(name: str) -> str:
    """Why stock diffusers cannot be driven this way, or ""."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = run(build(name), name)
        if not isinstance(out, torch.Tensor):
            return type(out).__name__
        return "" if out.isfinite().all() else "stock gives no numbers"
    except Exception as error:  # whatever a pipeline misses
        import traceback

        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:110]!r} @ {at.name}:{at.lineno}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, run(build(name), name).shape)
    reasons = {} if sys.argv[1:] else {name: why_not(name) for name in pipelines()}
    for name, why in sorted(reasons.items(), key=lambda pair: pair[1]):
        print(f"{name:<44} {why or 'runs'}")
    print(sum(not why for why in reasons.values()), "of", len(reasons))
