"""HunyuanVideo 1.5 in Tencent's own names; of the -sparse files with SSTA in every layer.

`config.json` beside the file tells SSTA's form (`attn_param`), else the published one is taken.
Distilled files are run without guidance, and at the pipeline's own steps.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.checkpoints.content import Checkpoint, Entry
from dit_accel.checkpoints.files import Source
from dit_accel.checkpoints.names import bare
from dit_accel.methods.ssta import SSTA

BLOCK = re.compile(r"double_blocks\.\d+\.img_attn_q\.")
_REFINER = r"^txt_in\.individual_token_refiner\.blocks\.(\d+)\."
_REFINED = r"context_embedder.token_refiner.refiner_blocks.\1."
_FUSED = re.compile(_REFINER + r"self_attn_qkv\.(weight|bias)$")
_MOVED = [
    (r"^time_in\.mlp\.0\.", "time_embed.timestep_embedder.linear_1."),
    (r"^time_in\.mlp\.2\.", "time_embed.timestep_embedder.linear_2."),
    (r"^time_r_in\.mlp\.0\.", "time_embed.timestep_embedder_r.linear_1."),
    (r"^time_r_in\.mlp\.2\.", "time_embed.timestep_embedder_r.linear_2."),
    (r"^txt_in\.t_embedder\.mlp\.0\.",
     "context_embedder.time_text_embed.timestep_embedder.linear_1."),
    (r"^txt_in\.t_embedder\.mlp\.2\.",
     "context_embedder.time_text_embed.timestep_embedder.linear_2."),
    (r"^txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
    (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
    (_REFINER + r"self_attn_proj\.", _REFINED + "attn.to_out.0."),
    (_REFINER + r"mlp\.fc1\.", _REFINED + "ff.net.0.proj."),
    (_REFINER + r"mlp\.fc2\.", _REFINED + "ff.net.2."),
    (_REFINER + r"adaLN_modulation\.1\.", _REFINED + "norm_out.linear."),
    (_REFINER, _REFINED),
    (r"^byt5_in\.layernorm\.", "context_embedder_2.norm."),
    (r"^byt5_in\.fc(\d)\.", r"context_embedder_2.linear_\1."),
    (r"^vision_in\.proj\.0\.", "image_embedder.norm_in."),
    (r"^vision_in\.proj\.1\.", "image_embedder.linear_1."),
    (r"^vision_in\.proj\.3\.", "image_embedder.linear_2."),
    (r"^vision_in\.proj\.4\.", "image_embedder.norm_out."),
    (r"^img_in\.", "x_embedder."),
    (r"^cond_type_embedding\.", "cond_type_embed."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^double_blocks\.(\d+)\.img_mod\.", r"transformer_blocks.\1.norm1."),
    (r"^double_blocks\.(\d+)\.txt_mod\.", r"transformer_blocks.\1.norm1_context."),
    (r"^double_blocks\.(\d+)\.img_attn_(q|k)_norm\.", r"transformer_blocks.\1.attn.norm_\2."),
    (r"^double_blocks\.(\d+)\.txt_attn_(q|k)_norm\.", r"transformer_blocks.\1.attn.norm_added_\2."),
    (r"^double_blocks\.(\d+)\.img_attn_proj\.", r"transformer_blocks.\1.attn.to_out.0."),
    (r"^double_blocks\.(\d+)\.txt_attn_proj\.", r"transformer_blocks.\1.attn.to_add_out."),
    (r"^double_blocks\.(\d+)\.img_attn_(q|k|v)\.", r"transformer_blocks.\1.attn.to_\2."),
    (r"^double_blocks\.(\d+)\.txt_attn_(q|k|v)\.", r"transformer_blocks.\1.attn.add_\2_proj."),
    (r"^double_blocks\.(\d+)\.img_mlp\.fc1\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"^double_blocks\.(\d+)\.img_mlp\.fc2\.", r"transformer_blocks.\1.ff.net.2."),
    (r"^double_blocks\.(\d+)\.txt_mlp\.fc1\.", r"transformer_blocks.\1.ff_context.net.0.proj."),
    (r"^double_blocks\.(\d+)\.txt_mlp\.fc2\.", r"transformer_blocks.\1.ff_context.net.2."),
]  # fmt: skip


def recognise(source: Source) -> bool:
    """Blocks of HunyuanVideo 1.5, q and k and v apart."""
    return any(map(BLOCK.search, source))


def read(source: Source) -> Checkpoint:
    """Weights by diffusers' names, and SSTA where the file or its configuration says sparse."""
    weights, origin = _weights(source)
    told = source.config.get("attn_param") or {}
    sparse = source.says("sparse") or source.config.get("attn_mode") == "flex-block-attn"
    notes = [] if sparse else ["no -sparse in the file's name: attention stays as it is"]
    if source.says("distilled"):
        notes.append("run it without guidance: pipe.guider = pipe.guider.new(guidance_scale=1.0)")
    return Checkpoint(
        "HunyuanVideo 1.5 sparse" if sparse else "HunyuanVideo 1.5",
        weights,
        method=_method(told) if sparse else None,
        whole=True,
        origin=origin,
        used=list(source),
        unused=list(source.strangers),
        notes=notes,
    )


def _method(told: dict[str, Any]) -> SSTA:
    """SSTA of a published configuration; ValueError for a form that is not served."""
    served = {
        "attn_sparse_type": "ssta",
        "attn_pad_type": "zero",
        "ssta_sampling_type": "importance",
        "ssta_threshold": 0.0,
        "ssta_adaptive_pool": None,
        "attn_mask_share_within_head": 0,
    }
    for name, value in served.items():
        if told.get(name, value) != value:
            raise ValueError(f"SSTA with {name}={told[name]!r} is not served: {value!r} is")
    usual = SSTA()
    return SSTA(
        most=told.get("ssta_topk", usual.most),
        tile=told.get("tile_size", usual.tile),
        window=told.get("win_size", [usual.window])[0],
        likeness=told.get("ssta_lambda", usual.likeness),
    )


def _weights(source: Source) -> tuple[dict[str, Entry], dict[str, list[str]]]:
    weights: dict[str, Entry] = {}
    origin: dict[str, list[str]] = {}
    for name, entry in source.entries.items():
        short = bare(name)
        fused = _FUSED.match(short)
        if fused:
            for i, part in enumerate("qkv"):
                new = f"{_FUSED.sub(_REFINED, short)}attn.to_{part}.{fused[2]}"
                shape = (entry.shape[0] // 3, *entry.shape[1:])
                weights[new] = Entry(shape, partial(_third, entry, i))
                origin[new] = [name]
            continue
        new = _renamed(short)
        swapped = short.startswith("final_layer.adaLN_modulation.")
        weights[new] = Entry(entry.shape, partial(_swapped, entry)) if swapped else entry
        origin[new] = [name]
    return weights, origin


def _renamed(name: str) -> str:
    for pattern, new in _MOVED:
        found, count = re.subn(pattern, new, name)
        if count:
            return found
    return name


def _third(entry: Entry, i: int) -> Tensor:
    return entry.load().chunk(3)[i].clone()


def _swapped(entry: Entry) -> Tensor:
    """Shift and scale as scale and shift."""
    shift, scale = entry.load().chunk(2)
    return torch.cat([scale, shift])
