"""The figure of benchmarks/: time and memory of the whole operators against the length.

    python benchmarks/figure.py benchmarks/results/h100-kernels.json benchmarks/scaling.svg

Reads the cases named "scaling" of benchmarks/gpu_kernels.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

COLOURS = {"sparse": "#4477aa", "pooled": "#ee6677", "rectified": "#228833", "sla": "#ccbb44"}
LABELS = {"sparse": "block-sparse", "sla": "SLA"}
LINES = {"a tenth": "-", "64 blocks": "--"}


def draw(cases: list[dict[str, Any]], gpu: str, target: Path) -> None:
    """Two panels, both logarithmic; solid: a tenth of the key blocks, dashed: 64 of them."""
    matplotlib.rcParams |= {"font.size": 9, "svg.hashsalt": "dit_accel", "axes.grid": True}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = [case["n"] for case in cases]
    left.loglog(lengths, [case["ms"]["cudnn"] for case in cases], color="#888888", label="cuDNN")
    for name in cases[0]["peak_bytes"]:
        op, _, kept = name.partition(", ")
        look = {"color": COLOURS[op], "linestyle": LINES[kept]}
        label = LABELS.get(op, op) if kept == "a tenth" else None
        left.loglog(lengths, [case["ms"][name] for case in cases], **look, label=label)
        # the result is a third of q, k and v
        extra = [100 * (c["peak_bytes"][name] / c["inputs_bytes"] - 1 / 3) for c in cases]
        right.semilogx(lengths, extra, **look, label=label)
    left.set(title="table and operator, milliseconds", xlabel="tokens, 12 heads of 128")
    right.set(title="memory beside the result, % of q + k + v", xlabel="tokens", ylim=(0, None))
    ticks = lengths[::2]
    for panel in (left, right):
        panel.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
        panel.minorticks_off()
    left.legend(frameon=False)
    figure.suptitle(f"{gpu}, bfloat16; solid: a tenth of the key blocks, dashed: 64 of them")
    figure.savefig(target, metadata={"Date": None})


def main(arguments: list[str]) -> None:
    """source.json target.svg"""
    source, target = map(Path, arguments)
    record = json.loads(source.read_text())
    cases = [c for c in record["cases"] if c["case"].startswith("scaling") and "ms" in c]
    draw(cases, record["environment"]["gpu"], target)


if __name__ == "__main__":
    main(sys.argv[1:])
