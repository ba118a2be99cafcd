"""FastH3: MiniMax H3 distilled to 4 or 8 steps with VSA, whole or as changes of the base model.

The adapter holds low-rank pairs without alpha, differences (`.diff`, `.diff_b`) and gates that are
set (`.set_weight`). `fastvideo_inference.json` beside it tells sparsity, tile, rungs and shifts;
where it is missing, those that were published with each.
"""

from __future__ import annotations

import re
from typing import Any

from dit_accel.checkpoints import minimax
from dit_accel.checkpoints.content import Checkpoint, Entry
from dit_accel.checkpoints.edits import are_in
from dit_accel.checkpoints.edits import read as read_edits
from dit_accel.checkpoints.files import Source
from dit_accel.checkpoints.names import bare
from dit_accel.methods.vsa import VSA

GATE = re.compile(r"blocks\.(\d+)\.attn\.to_gate_compress\.(?:weight|set_weight)$")
TILES = {64: (4, 4, 4), 128: (4, 4, 8)}
FOUR = {"vsa_sparsity": 0.9, "dmd_denoising_steps": [999, 749, 500, 250],
        "video_scheduler_shift": 12.0, "audio_scheduler_shift": 3.0}  # fmt: skip
EIGHT = {"vsa_sparsity": 0.8, "dmd_denoising_steps": [999, 874, 749, 624, 500, 375, 250, 125],
         "video_scheduler_shift": 10.0, "audio_scheduler_shift": 3.0}  # fmt: skip


def recognise(source: Source) -> bool:
    """VSA's gates in a model of H3."""
    return any(map(GATE.search, source)) and minimax.is_h3(source)


def read(source: Source) -> Checkpoint:
    """Weights or changes, the gates, and how the student was trained to be sampled."""
    told = _told(source)
    rungs = [float(rung) for rung in told["dmd_denoising_steps"]]
    part = _changes(source) if are_in(source) else _whole(source)
    part.method = VSA(keep=1 - told["vsa_sparsity"], tile=_tile(told.get("vsa_tile_size", 64)))
    part.sampler = "dmd:" + ",".join(f"{rung:g}" for rung in rungs)
    part.shifts = (told["video_scheduler_shift"], told["audio_scheduler_shift"])
    part.arguments = {"num_inference_steps": len(rungs) + 1}
    part.unused += source.strangers
    return part


def _told(source: Source) -> dict[str, Any]:
    usual = EIGHT if re.search(r"8[-_]?step", source.title) else FOUR
    return usual | source.sidecar


def _tile(tokens: int) -> tuple[int, int, int]:
    if tokens not in TILES:
        raise ValueError(f"FastH3 with tiles of {tokens} tokens is not served: of 64 or 128 are")
    return TILES[tokens]


def _whole(source: Source) -> Checkpoint:
    gates = {name: m for name in source if (m := GATE.search(name))}
    learned = {f"layers.{m[1]}.weight": source.entries[name].load() for name, m in gates.items()}
    rest = Source(source.path, {n: e for n, e in source.entries.items() if n not in gates})
    weights = minimax.renamed(rest)
    return Checkpoint("FastH3", weights, learned=learned, whole=True, used=list(source))


def _changes(source: Source) -> Checkpoint:
    edits, unused = read_edits(source, bare)
    learned, weights = {}, {}
    for name, entry in minimax.replacements(edits).items():
        found = GATE.search(name)
        if found:
            learned[f"layers.{found[1]}.weight"] = entry.load()
        else:
            weights[name] = entry
    added: dict[str, Entry] = {n: e.change() for n, e in edits.items() if e.set is None}
    used = [name for edit in edits.values() for name in edit.names]
    return Checkpoint(
        "FastH3 adapter",
        minimax.by_diffusers_names(weights),
        minimax.by_diffusers_names(added),
        learned,
        used=used,
        unused=unused,
    )
