"""Names of tensors: what each engine calls them → what diffusers calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dit_accel.checkpoints.content import Entry

_PREFIXES = ("net.", "model.diffusion_model.", "diffusion_model.", "module.", "base_model.model.")

# FastVideo's own module tree, which its 14B export was written from.
_FASTVIDEO = [
    (r"^patch_embedding\.proj\.", "patch_embedding."),
    (r"^condition_embedder\.(text|time)_embedder\.(?:mlp\.)?fc_in\.",
     r"condition_embedder.\1_embedder.linear_1."),
    (r"^condition_embedder\.(text|time)_embedder\.(?:mlp\.)?fc_out\.",
     r"condition_embedder.\1_embedder.linear_2."),
    (r"^condition_embedder\.time_modulation\.linear\.", "condition_embedder.time_proj."),
    (r"^condition_embedder\.image_embedder\.ff\.fc_in\.",
     "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^condition_embedder\.image_embedder\.ff\.fc_out\.",
     "condition_embedder.image_embedder.ff.net.2."),
    (r"^blocks\.(\d+)\.to_(q|k|v)\.", r"blocks.\1.attn1.to_\2."),
    (r"^blocks\.(\d+)\.to_out\.(?!0\.)", r"blocks.\1.attn1.to_out.0."),
    (r"^blocks\.(\d+)\.norm_(q|k)\.", r"blocks.\1.attn1.norm_\2."),
    (r"^blocks\.(\d+)\.attn2\.to_out\.(?!0\.)", r"blocks.\1.attn2.to_out.0."),
    (r"^blocks\.(\d+)\.ffn\.fc_in\.", r"blocks.\1.ffn.net.0.proj."),
    (r"^blocks\.(\d+)\.ffn\.fc_out\.", r"blocks.\1.ffn.net.2."),
    (r"^blocks\.(\d+)\.self_attn_residual_norm\.norm\.", r"blocks.\1.norm2."),
]  # fmt: skip


def bare(name: str) -> str:
    """The name without what wrappers put before it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def wan(names: Iterable[str]) -> dict[str, str]:
    """Name in a file of Wan (its own naming, diffusers' or FastVideo's) → diffusers' name."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    plain = {name: bare(name) for name in names}
    original = any(".self_attn." in name or ".cross_attn." in name for name in plain.values())
    if original:
        found = convert_wan_transformer_to_diffusers({name: name for name in plain.values()})
        new = {old: name for name, old in found.items()}
        return {name: new.get(short, short) for name, short in plain.items()}
    return {name: _first(short, _FASTVIDEO) for name, short in plain.items()}


def _first(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def as_patches(entry: Entry, patch: tuple[int, int, int] = (1, 2, 2)) -> Entry:
    """A patch embedding stored as a linear layer [C, c·t·h·w], as the convolution [C, c, t, h, w]
    that it is."""
    if len(entry.shape) != 2:
        return entry
    t, h, w = patch
    shape = (entry.shape[0], entry.shape[1] // (t * h * w), *patch)
    return Entry(shape, lambda: entry.load().view(shape))
