"""A transformer from its configuration alone: one layer of each kind, random weights, inputs.

So a model can be examined without its weights: the time of a layer does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.inputs.data import read_object
from dit_accel.inputs.fields import expect
from dit_accel.machine import is_out_of_memory

Size = tuple[int, int, int]


class Shell:
    """As much of a pipeline as `accelerate` looks at."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.scheduler = None


@dataclass(frozen=True)
class Family:
    """What a family's forward takes.

    inputs: (config, latent size (T, H, W), text tokens) → arguments, as shapes or tensors.
    size: (frames, height, width) in pixels unless asked otherwise.
    text: tokens of the prompt.
    compression: pixels per latent in time and space.
    counts: configuration keys of the numbers of layers.
    passes: forwards in a step.
    """

    inputs: Callable[[Any, Size, int], dict[str, Any]]
    size: Size
    text: int
    compression: tuple[int, int] = (4, 8)
    counts: tuple[str, ...] = ("num_layers",)
    passes: int = 1


@dataclass(frozen=True)
class Skeleton:
    """A transformer of one layer of each kind, arguments of a forward, and how many layers of each
    kind the model has."""

    pipe: Shell
    arguments: dict[str, Any]
    counts: list[int]
    passes: int


def _wan(c: Any, size: Size, text: int) -> dict[str, Any]:
    return {
        "hidden_states": (1, c.in_channels, *size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": (1, text, c.text_dim),
    }


def _cogvideox(c: Any, size: Size, text: int) -> dict[str, Any]:
    t, h, w = size
    rows = (t // (c.patch_size_t or 1)) * (h // c.patch_size) * (w // c.patch_size)
    rotary = (torch.randn(rows, c.attention_head_dim),) * 2
    return {
        "hidden_states": (2, t, c.in_channels, h, w),
        "encoder_hidden_states": (2, text, c.text_embed_dim),
        "timestep": torch.tensor([500, 500]),
        "image_rotary_emb": rotary if c.use_rotary_positional_embeddings else None,
    }


def _flux(c: Any, size: Size, text: int) -> dict[str, Any]:
    rows, columns = size[1] // 2, size[2] // 2
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)
    return {
        "hidden_states": (1, rows * columns, c.in_channels),
        "encoder_hidden_states": (1, text, c.joint_attention_dim),
        "pooled_projections": (1, c.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5]) if c.guidance_embeds else None,
    }


def _hunyuan(c: Any, size: Size, text: int) -> dict[str, Any]:
    return {
        "hidden_states": (1, c.in_channels, *size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": (1, text, c.text_embed_dim),
        "encoder_attention_mask": torch.arange(text)[None] < text // 4,
        "pooled_projections": (1, c.pooled_projection_dim),
        "guidance": torch.tensor([6000.0]) if c.guidance_embeds else None,
    }


_BOTH = ("num_layers", "num_single_layers")
FAMILIES = {
    "WanTransformer3DModel": Family(_wan, (81, 480, 832), 512, passes=2),
    "CogVideoXTransformer3DModel": Family(_cogvideox, (49, 480, 720), 226),
    "FluxTransformer2DModel": Family(_flux, (1, 1024, 1024), 512, (1, 8), _BOTH),
    "HunyuanVideoTransformer3DModel": Family(_hunyuan, (129, 720, 1280), 256, counts=_BOTH),
}


def family_of(name: str) -> Family:
    """The family of a transformer class; ValueError says which are known."""
    if name not in FAMILIES:
        raise ValueError(
            f"{name} cannot be examined from its configuration alone, only {', '.join(FAMILIES)} "
            "can: load the model with its weights"
        )
    return FAMILIES[name]


def read_config(model: str) -> dict[str, Any]:
    """transformer/config.json of a folder or Hugging Face id, or the file itself.

    Raises ValueError when there is none.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "transformer" / "config.json"
    elif not path.exists() and model.count("/") == 1 and not model.startswith((".", "/", "~")):
        path = _from_hub(model)
    try:
        config = read_object(path, "configuration")
        expect("_class_name", config.get("_class_name"), str)
    except ValueError as error:
        raise ValueError(
            f"{model} has no transformer configuration that can be read: {error}"
        ) from None
    return config


def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "transformer/config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the configuration of {model} cannot be had: {reason}") from None


def skeleton(
    config: dict[str, Any], size: Size, device: torch.device, dtype: torch.dtype
) -> Skeleton:
    """One layer of each kind of the model with this configuration, and inputs of `size` pixels.

    size: (frames, height, width).
    """
    import diffusers

    family = family_of(config["_class_name"])
    kind = getattr(diffusers, config["_class_name"])
    values = {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        counts = [values[key] for key in family.counts]
        for key, count in zip(family.counts, counts, strict=True):
            expect(key, count, int)
        with torch.device(device):
            transformer = kind(**{**values, **dict.fromkeys(family.counts, 1)}).eval().to(dtype)
        arguments = family.inputs(transformer.config, latent_size(config, size), family.text)
    except Exception as error:  # whatever diffusers' classes say of values they cannot take
        if is_out_of_memory(error):
            raise
        why = (str(error).splitlines() or [""])[0]
        name = config["_class_name"]
        raise ValueError(
            f"the configuration is none of a {name}: {type(error).__name__}: {why}"
        ) from error
    made = {name: _tensor(x, device, dtype) for name, x in arguments.items()}
    return Skeleton(Shell(transformer), {**made, "return_dict": False}, counts, family.passes)


def latent_size(config: dict[str, Any], size: Size) -> Size:
    """(T, H, W) latents of (frames, height, width) pixels."""
    t, s = family_of(config["_class_name"]).compression
    s = 16 if config.get("in_channels") == 48 else s  # Wan 2.2's 5B autoencoder
    frames, height, width = size
    return (frames - 1) // t + 1, height // s, width // s


def _tensor(value: object, device: torch.device, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and all(isinstance(n, int) for n in value):
        return torch.randn(value, device=device, dtype=dtype)
    return tuple(_tensor(x, device, dtype) for x in value) if isinstance(value, tuple) else value
