"""LightX2V's MiniMax H3 Turbo: a LoRA of few steps; of the -sla files with top-k blocks, no linear
branch and no dense step."""

from __future__ import annotations

import re

from dit_accel.checkpoints import minimax
from dit_accel.checkpoints.content import Checkpoint
from dit_accel.checkpoints.files import Source
from dit_accel.methods.topk import TopK

METHOD = TopK(keep=0.15, block_q=128, block_k=64, rounding="down")
ALPHA = 128.0
VIDEO_SHIFT, SOUND_SHIFT = 6.0, 3.0


def recognise(source: Source) -> bool:
    """Low-rank pairs of H3's blocks, and nothing that is not one."""
    return minimax.is_low_rank(source)


def read(source: Source) -> Checkpoint:
    """Four or eight steps of the even grid, shift 6 for the clip and 3 for its sound."""
    changes, used, unused = minimax.changes(source, ALPHA)
    sparse = source.says("sla")
    steps = 8 if re.search(r"(?<![0-9])8[-_]?step", source.title) else 4
    note = "no -sla in the file's name: attention stays as it is"
    return Checkpoint(
        "H3 Turbo SLA" if sparse else "H3 Turbo",
        changes=changes,
        method=METHOD if sparse else None,
        sampler="flow",
        shifts=(VIDEO_SHIFT, SOUND_SHIFT),
        arguments={"num_inference_steps": steps + 1},
        used=used,
        unused=unused,
        notes=[] if sparse else [note],
    )
