"""TurboWan (TurboDiffusion, arXiv 2512.16093): Wan distilled by rCM with SLA in every layer.

Original Wan naming in a .pth, or diffusers' in a folder; `proj_l` is SLA's projection, shared by
heads. In -quant files linear layers are int8 with a scale for each 128 × 128 of them.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from dit_accel.checkpoints import names
from dit_accel.checkpoints.content import Checkpoint, Entry
from dit_accel.checkpoints.edits import are_in
from dit_accel.checkpoints.files import Source
from dit_accel.methods.sla import SLA

PROJECTION = re.compile(r"blocks\.(\d+)\..*local_attn\.proj_l\.(weight|bias)$")
METHOD = SLA(keep=0.1, block_q=128, block_k=64, linear="all", rounding="down")
TILE = 128  # rows and columns of a weight that share a scale
_PICTURE = 36  # latent channels of image to video


def recognise(source: Source) -> bool:
    """SLA's projections beside whole weights."""
    return any(map(PROJECTION.search, source)) and not are_in(source)


def read(source: Source) -> Checkpoint:
    """SLA as TurboWan has it, rCM's sampler, the boundary between Wan 2.2's experts."""
    learned = projections(source)
    plain = {n: e for n, e in source.entries.items() if not PROJECTION.search(n)}
    entries, origins = dequantised(plain)
    new = names.wan(entries)
    weights = {new[name]: entry for name, entry in entries.items()}
    patches = "patch_embedding.weight"
    picture = False
    if patches in weights:
        weights[patches] = names.as_patches(weights[patches])
        picture = weights[patches].shape[1] == _PICTURE
    quantised = any(name.endswith(".int8_weight") for name in source)
    return Checkpoint(
        "TurboWan",
        weights,
        learned=learned,
        method=METHOD,
        sampler="rcm:200" if picture else "rcm:80",
        arguments={"num_inference_steps": 4, "guidance_scale": 1.0},
        boundary=0.9 if picture else None,
        whole=True,
        origin={new[name]: origins[name] for name in entries},
        used=list(source),
        unused=list(source.strangers),
        notes=["its int8 linear layers are widened to the model's dtype"] if quantised else [],
    )


def projections(source: Source) -> dict[str, Tensor]:
    """The learned tensors of SLA, by layer."""
    found = ((PROJECTION.search(name), entry) for name, entry in source.entries.items())
    return {f"layers.{m[1]}.{m[2]}": entry.load().float() for m, entry in found if m}


def dequantised(entries: dict[str, Entry]) -> tuple[dict[str, Entry], dict[str, list[str]]]:
    """`int8_weight` and `scale` as the weight that they stand for, other entries as they are; and
    the names that each was made of."""
    out, origins = dict(entries), {name: [name] for name in entries}
    for name in entries:
        module, dot, part = name.rpartition(".")
        if part != "int8_weight" or f"{module}.scale" not in entries:
            continue
        weight, scale = out.pop(name), out.pop(f"{module}.scale")
        out[f"{module}{dot}weight"] = Entry(weight.shape, _widener(weight, scale))
        origins[f"{module}{dot}weight"] = [name, f"{module}.scale"]
    return out, origins


def _widener(weight: Entry, scale: Entry):
    def widen() -> Tensor:
        scales = scale.load().float()
        for axis, size in enumerate(weight.shape):
            scales = scales.repeat_interleave(TILE, axis).narrow(axis, 0, size)
        return weight.load().to(torch.float32) * scales

    return widen
