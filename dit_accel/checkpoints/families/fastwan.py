"""FastWan and FastVideo's other Wan with VSA (arXiv 2505.13389): gates beside whole weights.

`to_gate_compress` [C, C] of each block; names of diffusers, of FastVideo's own modules, or mixed,
with or without an index. FastWan is distilled by distribution matching; VSA models of many steps
are not.
"""

from __future__ import annotations

import re

from dit_accel.checkpoints import minimax, names
from dit_accel.checkpoints.content import Checkpoint
from dit_accel.checkpoints.files import Source
from dit_accel.methods.vsa import VSA

GATE = re.compile(r"blocks\.(\d+)\.(?:attn1?\.)?to_gate_compress\.(weight|bias)$")
LARGE = 5120  # channels of the 14B model, trained at 90 % sparsity; the others at 80 %


def recognise(source: Source) -> bool:
    """VSA's gates in a model that is not H3."""
    return any(map(GATE.search, source)) and not minimax.is_h3(source)


def read(source: Source) -> Checkpoint:
    """VSA with the share of tiles that the model of its size was trained with."""
    gates = {name: m for name in source if (m := GATE.search(name))}
    learned = {f"layers.{m[1]}.{m[2]}": source.entries[name].load() for name, m in gates.items()}
    entries = {name: entry for name, entry in source.entries.items() if name not in gates}
    new = names.wan(entries)
    weights = {new[name]: entry for name, entry in entries.items()}
    large = max(source.entries[name].shape[0] for name in gates) >= LARGE
    distilled = "fastwan" in source.title
    return Checkpoint(
        "FastWan" if distilled else "Wan VSA",
        weights,
        learned=learned,
        method=VSA(keep=0.1 if large else 0.2),
        sampler="dmd" if distilled else None,
        arguments={"num_inference_steps": 3, "guidance_scale": 1.0} if distilled else {},
        whole=True,
        origin={new[name]: [name] for name in entries},
        used=list(source),
        unused=list(source.strangers),
    )
