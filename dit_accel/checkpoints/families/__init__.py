"""The families of published checkpoints, one file each: how one is recognised and what it says.

A file has `recognise(source) -> bool` and `read(source) -> Checkpoint`. The first that recognises a
source reads it, so the more particular ones come first.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from dit_accel.checkpoints import minimax, names
from dit_accel.checkpoints.content import Checkpoint
from dit_accel.checkpoints.files import Source

FAMILIES = (
    "converted", "hunyuan_sparse", "turbowan", "sla_difference", "fasth3", "h3_turbo", "fastwan",
)  # fmt: skip


def of(source: Source) -> ModuleType:
    """The family of a source; ValueError names some of its tensors where there is none."""
    for name in FAMILIES:
        family = import_module(f"dit_accel.checkpoints.families.{name}")
        if family.recognise(source):
            return family
    some = ", ".join(list(source)[:3]) or "nothing"
    raise ValueError(
        f"{source.path} is none of the checkpoints that are known ({', '.join(FAMILIES[1:])}): it "
        f"holds {some} …; weights of a stock model are loaded by diffusers itself"
    )


def stock(source: Source) -> Checkpoint:
    """The weights of a model as it was published, for a difference to them."""
    if minimax.is_h3(source):
        return Checkpoint("stock", minimax.renamed(source), slot=source.slot)
    new = names.wan(source)
    weights = {new[name]: entry for name, entry in source.entries.items()}
    patches = "patch_embedding.weight"
    if patches in weights:
        weights[patches] = names.as_patches(weights[patches])
    return Checkpoint("stock", weights, slot=source.slot)
