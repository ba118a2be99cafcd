"""A processor's call with the attention function exchanged for ours."""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn

from dit_accel.pipelines.base import StandIn
from dit_accel.runtime import seam

NAMES = ("dispatch_attention_fn", "scaled_dot_product_attention")


def obstacle(module: nn.Module) -> str:
    """Why this attention module cannot be patched, or ""."""
    processor = getattr(module, "processor", None)
    if layer_of(processor) is not None:
        return ""  # ours already: it is given back before the new one comes
    if processor is None:
        return f"{type(module).__name__} has no exchangeable attention processor"
    call = type(processor).__call__
    if not hasattr(call, "__code__") or not set(NAMES) & set(call.__code__.co_names):
        return f"{type(processor).__name__} calls neither {NAMES[0]} nor {NAMES[1]}"
    return ""


def layer_of(processor: object) -> seam.Layer | None:
    """The layer that a processor of ours serves; None for others."""
    return getattr(processor, "__dict__", {}).get("_accel")


def bind(module: nn.Module, layer: seam.Layer, own: StandIn | None = None) -> None:
    """Let `layer` serve this module's attention, by `own` where that was written for it."""
    old = module.processor
    kind = rebound_class(type(old), own.call if own and replaces(own, type(old)) else None)
    layer.dispatch = type(old).__call__.__globals__.get(NAMES[0])
    if isinstance(old, nn.Module):  # swap the class so that its parameters stay registered
        old.__dict__["_accel"] = layer
        old.__class__ = kind
        layer.processor = old
        return
    layer.original, layer.processor = old, object.__new__(kind)
    layer.processor.__dict__.update(old.__dict__, _accel=layer)
    _set_processor(module, layer.processor)


def unbind(module: nn.Module) -> None:
    """Give the processor back, with what was set on ours; one that is not ours stays."""
    layer = layer_of(module.processor)
    if layer is not None:
        old = original(module.processor)
        if old is not module.processor:
            _set_processor(module, old)


def original(processor: Any) -> Any:
    """What a processor of ours stands for, as it is now; another one itself."""
    layer = layer_of(processor)
    if layer is None:
        return processor
    if layer.original is None:
        del processor.__dict__["_accel"]
        processor.__class__ = type(processor)._accel_kind
        return processor
    layer.original.__dict__.clear()
    layer.original.__dict__.update(processor.__dict__)
    del layer.original.__dict__["_accel"]
    return layer.original


class Rebound(type):
    """The kind of our processor classes, each of which passes for its parent: diffusers looks
    processors up by class (layer skip, PAG), and makes new ones of the class it finds."""

    _accel_kind: type

    def __call__(cls, *args: object, **kwargs: object) -> object:
        return cls._accel_kind(*args, **kwargs)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls._accel_kind

    def __hash__(cls) -> int:
        return hash(cls._accel_kind)


def replaces(own: StandIn, kind: type) -> bool:
    """Was `own` written for what this processor class runs, all of it diffusers' code but for
    attention?"""
    home = str(Path(diffusers.__file__).parent) + os.sep
    call: Any = kind.__call__
    inner = [x for x in call.__code__.co_consts if isinstance(x, types.CodeType)]
    names = {name for code in (call.__code__, *inner) for name in code.co_names}
    used = (call.__globals__.get(name) for name in names - set(NAMES))
    functions = [call, *(x for x in used if isinstance(x, types.FunctionType))]
    theirs = all(function.__code__.co_filename.startswith(home) for function in functions)
    return theirs and names <= set(own.names.split())


def rebound_class(kind: type, own: Callable | None = None) -> type:
    """A subclass of the processor class, as it is now, whose attention calls come to us; it runs
    `own` where that is given, and its own code where `own` returns NotImplemented. A copy of its
    objects is bound to the copy of their layer."""
    call = own or kind.__call__
    found = _rebound(kind, call)
    _follow(vars(sys.modules[found.__module__]), call.__globals__)
    return found


def _follow(own: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The names of a processor's module, with what they stand for now, but for attention's."""
    ours, dispatch = {"__name__"}, theirs.get(NAMES[0])
    if dispatch is not None:
        ours.add(NAMES[0])
        if getattr(own.get(NAMES[0]), "__wrapped__", None) is not dispatch:
            own[NAMES[0]] = _dispatcher(dispatch)
    if theirs.get("F") is F:
        ours.add("F")
        own["F"] = _functional()
    own.update({name: value for name, value in theirs.items() if name not in ours})


@functools.cache
def _rebound(kind: type, call: Callable) -> type:
    """The subclass that runs this code, over a module of its own for the names in it."""
    module = types.ModuleType(f"dit_accel._rebound.{kind.__module__}.{kind.__qualname__}")
    own = call if call is not kind.__call__ else None
    plain: Any = rebound_class(kind).__call__ if own else None
    if module.__name__ in sys.modules:  # the class was given other code since
        module.__name__ += f".{id(call)}"
    sys.modules[module.__name__] = module  # Dynamo guards on globals by module name
    bound = types.FunctionType(
        call.__code__, module.__dict__, call.__name__, call.__defaults__, call.__closure__
    )
    bound.__kwdefaults__ = call.__kwdefaults__

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = seam.CURRENT.call
        now.layer = self._accel.number
        if self._accel.gated:
            now.hidden = kwargs["hidden_states"] if len(args) < 2 else args[1]
        out = bound(self, *args, **kwargs)
        return plain(self, *args, **kwargs) if out is NotImplemented else out

    def __reduce_ex__(self: object, protocol: object) -> tuple[object, ...]:
        return _blank, (kind, own), dict(self.__dict__)

    body = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": module.__name__,
        "_accel_kind": kind,
    }
    return Rebound(kind.__name__, (kind,), body)


def _blank(kind: type, own: Callable | None = None) -> object:
    return object.__new__(rebound_class(kind, own))


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
        plain = plain and (attn_mask is None or isinstance(attn_mask, torch.Tensor))
        if plain and not seam.traced_away():
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
        if dropout_p or is_causal or more.get("enable_gqa") or seam.traced_away():
            seam.bypassed()
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more
            )
        return seam.attend_bhnd(query, key, value, attn_mask, scale)

    vars(shim)["scaled_dot_product_attention"] = scaled_dot_product_attention
    sys.modules[shim.__name__] = shim
    return shim


def _set_processor(module: nn.Module, processor: object) -> None:
    setter = getattr(module, "set_processor", None)  # MochiAttention has none
    setter(processor) if setter else setattr(module, "processor", processor)
