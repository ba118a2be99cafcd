"""Names of MiniMax H3: a published file's or diffusers' → diffusers', for weights and changes."""

from __future__ import annotations

import re

import torch

from dit_accel.checkpoints.content import Entry
from dit_accel.checkpoints.edits import Edit, read
from dit_accel.checkpoints.files import Source
from dit_accel.checkpoints.names import bare

_PARTS = ("qkv_proj", "out_proj", "fc1", "fc2", "attn", "ff", "mlp", "adaln_proj")
_BLOCK = re.compile(r"(?:transformer_)?blocks\.\d+\.(?:%s)\b" % "|".join(_PARTS))  # noqa: UP031
PAIR = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".alpha")


def is_h3(source: Source) -> bool:
    """Blocks of H3 among the names."""
    names = [bare(name) for name in source]
    return any(map(_BLOCK.match, names)) and not any(".attn1." in n or "img_" in n for n in names)


def is_low_rank(source: Source) -> bool:
    """Low-rank pairs of H3's blocks alone."""
    return is_h3(source) and all(any(part in name for part in PAIR) for name in source)


def renamed(source: Source) -> dict[str, Entry]:
    """Whole weights by diffusers' names."""
    return by_diffusers_names({bare(name): entry for name, entry in source.entries.items()})


def changes(source: Source, alpha: float | None) -> tuple[dict[str, Entry], list[str], list[str]]:
    """What is added to weights by diffusers' names; names used, and unused."""
    edits, unused = read(source, bare, alpha)
    found = {name: edit.change() for name, edit in edits.items() if edit.set is None}
    used = [name for edit in edits.values() for name in edit.names]
    return by_diffusers_names(found), used, [*unused, *source.strangers]


def replacements(edits: dict[str, Edit]) -> dict[str, Entry]:
    """The parameters that a file replaces."""
    return {name: edit.set for name, edit in edits.items() if edit.set is not None}


def by_diffusers_names(entries: dict[str, Entry]) -> dict[str, Entry]:
    """By diffusers' names; fused projections of the published files come apart as diffusers takes
    them apart, which is linear and so right for changes too."""
    from diffusers.loaders.single_file_utils import (
        convert_minimax_h3_transformer_checkpoint_to_diffusers as convert,
    )

    out: dict[str, Entry] = {}
    for name, entry in entries.items():
        if not name.startswith(("blocks.", "token_refiner.blocks.")) and not _published(name):
            out[name] = entry
            continue
        hollow = convert({name: torch.empty(entry.shape, device="meta")}, {})
        for new, x in hollow.items():
            out[new] = Entry(tuple(x.shape), _converted(convert, name, entry, new))
    return out


def _published(name: str) -> bool:
    heads = ("video_patch_proj.", "audio_patch_proj.", "condition_proj.", "final_layer.", "rope.")
    return name.startswith((*heads, "time_embedder.proj_"))


def _converted(convert, name: str, entry: Entry, new: str):
    return lambda: convert({name: entry.load()}, {})[new]
