"""Transformer class name → adapter. Strings only: a family's file is imported when asked for."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from dit_accel.pipelines.base import Adapter

_HOME = {
    "WanTransformer3DModel": "wan",
    "FluxTransformer2DModel": "flux",
}
_EXTRA: dict[str, Adapter] = {}


def find(transformer: nn.Module) -> Adapter:
    """The adapter of a transformer; ValueError says what is known when there is none."""
    name = type(transformer).__name__
    if name in _EXTRA:
        return _EXTRA[name]
    if name not in _HOME:
        raise ValueError(
            f"{name} has no adapter: dit_accel knows {', '.join(sorted({**_HOME, **_EXTRA}))}; "
            "add one with dit_accel.register_adapter"
        )
    return import_module(f"dit_accel.pipelines.{_HOME[name]}").ADAPTER


def register_adapter(adapter: Adapter) -> None:
    """Make `accelerate` know the transformer classes of `adapter` (it wins over a built-in one)."""
    if not isinstance(adapter, Adapter):
        raise TypeError(f"an adapter is a dit_accel Adapter, not {type(adapter).__name__}")
    _EXTRA.update(dict.fromkeys(adapter.classes, adapter))
