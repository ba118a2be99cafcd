"""A processor's call with the attention function exchanged for ours."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dit_accel.runtime import seam

NAMES = ("dispatch_attention_fn", "scaled_dot_product_attention")


def obstacle(module: nn.Module) -> str:
    """Why this attention module cannot be patched, or ""."""
    processor = getattr(module, "processor", None)
    if hasattr(processor, "_accel_layer"):
        return ""  # ours already: it is given back before the new one comes
    if processor is None:
        return f"{type(module).__name__} has no exchangeable attention processor"
    call = type(processor).__call__
    if not hasattr(call, "__code__") or not set(NAMES) & set(call.__code__.co_names):
        return f"{type(processor).__name__} calls neither {NAMES[0]} nor {NAMES[1]}"
    return ""


@functools.cache
def rebound_class(kind: type) -> type:
    """A subclass of the processor class whose attention calls come to us."""
    call = kind.__call__
    module = types.ModuleType(f"dit_accel._rebound.{kind.__module__}.{kind.__qualname__}")
    scope = {k: v for k, v in call.__globals__.items() if k != "__name__"}
    module.__dict__.update(scope)
    if NAMES[0] in scope:
        module.__dict__[NAMES[0]] = _dispatcher(scope[NAMES[0]])
    if scope.get("F") is F:
        module.__dict__["F"] = _functional()
    sys.modules[module.__name__] = module  # Dynamo guards on globals by module name
    bound = types.FunctionType(
        call.__code__, module.__dict__, call.__name__, call.__defaults__, call.__closure__
    )
    bound.__kwdefaults__ = call.__kwdefaults__

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        seam.CURRENT.layer = self._accel_layer
        if self._accel_gated:
            seam.CURRENT.hidden = kwargs["hidden_states"] if len(args) < 2 else args[1]
        return bound(self, *args, **kwargs)

    sub = type(kind.__name__, (kind,), {"__call__": __call__, "__module__": module.__name__})
    _share_metadata(kind, sub)
    return sub


def _dispatcher(original: Callable) -> Callable:
    @functools.wraps(original)
    def dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
        attention_kwargs=None,
        *,
        backend=None,
        parallel_config=None,
    ):
        plain = not (dropout_p or is_causal or enable_gqa or attention_kwargs)
        if plain and (attn_mask is None or isinstance(attn_mask, torch.Tensor)):
            return seam.attend_bnhd(query, key, value, attn_mask, scale)
        seam.bypassed()
        return original(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            attention_kwargs,
            backend=backend,
            parallel_config=parallel_config,
        )

    return dispatch_attention_fn


@functools.cache
def _functional() -> types.ModuleType:
    """torch.nn.functional with our scaled_dot_product_attention."""
    shim = types.ModuleType("dit_accel._rebound.functional")
    shim.__dict__.update({k: v for k, v in F.__dict__.items() if k != "__name__"})

    @functools.wraps(F.scaled_dot_product_attention)
    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more
    ):
        if dropout_p or is_causal or more.get("enable_gqa"):
            seam.bypassed()
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more
            )
        return seam.attend_bhnd(query, key, value, attn_mask, scale)

    shim.scaled_dot_product_attention = scaled_dot_product_attention
    sys.modules[shim.__name__] = shim
    return shim


def _share_metadata(kind: type, sub: type) -> None:
    """diffusers looks processors up by exact class: give the subclass its parent's entry."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry as registry

    try:
        registry.register(sub, registry.get(kind))
    except ValueError:  # the parent has no entry, so the subclass needs none
        return


def give_back(module: nn.Module, new: Any, old: Any) -> None:
    """Restore the processor, with what was set on ours, unless the user set another one since."""
    if module.processor is not new:
        return
    old.__dict__.update({k: v for k, v in new.__dict__.items() if not k.startswith("_accel_")})
    set_processor(module, old)


def set_processor(module: nn.Module, processor: Any) -> None:
    setter = getattr(module, "set_processor", None)  # MochiAttention has none
    setter(processor) if setter else setattr(module, "processor", processor)
