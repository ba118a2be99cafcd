"""Grids of few steps, as diffusers schedulers: what a distilled model is sampled with."""

from dit_accel.samplers.grids import Sampler
from dit_accel.samplers.install import install, sampling

__all__ = ["GridScheduler", "H3GridScheduler", "Sampler", "install", "sampling"]


def __getattr__(name: str) -> object:
    if name in ("GridScheduler", "H3GridScheduler"):  # they import diffusers
        from dit_accel.samplers import schedulers

        return getattr(schedulers, name)
    raise AttributeError(f"module 'dit_accel.samplers' has no attribute {name!r}")
