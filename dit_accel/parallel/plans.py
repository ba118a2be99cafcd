"""How tokens are split: diffusers' plans, and those of models for which it has none."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_HUNYUAN = "HunyuanVideoTransformer3DModel"


def plan_of(model: nn.Module) -> dict[str, Any]:
    """Sub-module → which of its inputs or outputs are split or gathered; empty without a plan."""
    known = getattr(model, "_cp_plan", None)
    if known or type(model).__name__ != _HUNYUAN:
        return known or {}
    if getattr(model.config, "image_condition_type", None) == "token_replace":
        return {}  # the first frame has its own modulation, by its place among all tokens
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    tokens = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
    angles = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    return {
        "rope": {0: angles, 1: angles},
        "x_embedder": {0: tokens},
        "context_embedder": {0: tokens},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def prepare(model: Any) -> None:
    """What a model that is split by a plan from here needs besides."""
    if type(model).__name__ == _HUNYUAN and not getattr(model, "_cp_plan", None):
        model.register_forward_pre_hook(_unpadded, with_kwargs=True)
        for blocks in (model.transformer_blocks, model.single_transformer_blocks):
            for block in blocks:
                block.attn.register_forward_pre_hook(_unmasked, with_kwargs=True)


def _unpadded(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """HunyuanVideo counts valid text from the sequence's end, which a part of it does not have: the
    padding, which nothing reads, is cut off. ValueError where prompts differ in length."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    given: dict[str, Any] = bound.arguments
    mask = given["encoder_attention_mask"].bool()
    counts = mask.sum(1)
    n = int(counts.max())
    if not bool(mask[:, :n].all()):
        raise ValueError(
            f"HunyuanVideo on several devices takes prompts of one length in a call, not of "
            f"{sorted(set(counts.tolist()))} tokens: give one prompt a call"
        )
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        given[name] = given[name][:, :n]
    return bound.args[1:], bound.kwargs


def _unmasked(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Without padding its mask hides nothing."""
    return args, {**kwargs, "attention_mask": None}
