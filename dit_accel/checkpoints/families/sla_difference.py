"""SLA's training as a difference, to be added to another fine-tuned model of the same shape.

Low-rank pairs or `.diff` of the weights, and SLA's `proj_l` as they are. A whole checkpoint becomes
one with `load_checkpoint(…, base=…)`, the weights that it was trained from.
"""

from __future__ import annotations

from dit_accel.checkpoints import names
from dit_accel.checkpoints.content import Checkpoint
from dit_accel.checkpoints.edits import are_in
from dit_accel.checkpoints.edits import read as read_edits
from dit_accel.checkpoints.families import turbowan
from dit_accel.checkpoints.files import Source


def recognise(source: Source) -> bool:
    """SLA's projections beside changes of weights."""
    return any(map(turbowan.PROJECTION.search, source)) and are_in(source)


def read(source: Source) -> Checkpoint:
    """SLA as TurboWan has it; the model's own sampler stays, for it was not distilled."""
    edits, rest = read_edits(source, names.bare)
    new = names.wan(edits)
    changes = {new[name]: e.change() for name, e in edits.items() if e.set is None}
    patches = "patch_embedding.weight"
    if patches in changes:
        changes[patches] = names.as_patches(changes[patches])
    projections = [name for name in rest if turbowan.PROJECTION.search(name)]
    replaced = {new[name]: e.set for name, e in edits.items() if e.set is not None}
    return Checkpoint(
        "SLA difference",
        replaced,
        changes,
        turbowan.projections(source),
        turbowan.METHOD,
        origin={new[name]: edit.names for name, edit in edits.items()},
        used=[n for n in source if n not in rest or n in projections],
        unused=[n for n in rest if n not in projections] + source.strangers,
    )
