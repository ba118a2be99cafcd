"""Relative error of each method's attention output against dense, on a model's own activations.

    python benchmarks/attention_error.py --order raster tile

A dense generation runs, without guidance; every candidate is computed on the same q, k, v and
compared: ‖O − O_dense‖ / ‖O_dense‖, mean over layers and steps. `kept` is
the mean share of query-key block pairs that was computed, full steps of Re-ttention included.
Untrained SLA is top-k exactly.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dit_accel import Pooled, Rectified, Rettention, Schedule, TopK, accelerated
from dit_accel.evaluate.probe import Probe
from dit_accel.generation.loading import EMBEDDED, load_pipeline
from dit_accel.generation.request import Request, arguments
from dit_accel.methods import Call, Method

KEEPS = (0.1, 0.2, 0.3, 0.5)
NEVER = 1000  # steps: a window alone has no full step after the first
EVERY = 8  # steps between two measurements; methods with a state need every step
PROMPTS = ("snowman on a red background",)


def candidates(keep: float) -> dict[str, Method]:
    """The rows of the table at one keep."""
    plain = {"mass": 0.0, "neighbours": None}
    return {
        "topk": TopK(keep),
        "topk, int8": TopK(keep, precision="int8"),
        "topk, int8-hadamard": TopK(keep, precision="int8-hadamard"),
        "rectified, top-k only": Rectified(keep, gapr=False, **plain),
        "rectified, top-k only, GAPR": Rectified(keep, **plain),
        "rectified as published": Rectified(keep),
        "pooled": Pooled(keep),
        "pooled, line": Pooled(keep, tail="line"),
        "window alone": Rettention(keep, residual="none", rescale=False, period=NEVER),
    } | (remembering(keep) if keep == 0.2 else {})


def remembering(keep: float) -> dict[str, Method]:
    """Rows with a state."""
    return {
        "re-ttention": Rettention(keep),
        "re-ttention, pooled": Rettention(keep, residual="pooled"),
        "ditfastattn": Rettention(keep, rescale=False),
    }


class Books:
    """Runs the candidates on what a layer was given and notes (layer, step, kept, error)."""

    def __init__(self, only: Sequence[str], keeps: Sequence[float] = KEEPS) -> None:
        self.only, self.keeps = only, keeps
        self.entries: dict[str, list] = defaultdict(list)

    def see(self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, call: Call) -> None:
        for keep in self.keeps:
            for name, method in candidates(keep).items():
                if self.only and name not in self.only:
                    continue
                if call.step % EVERY == 0 or (method.stateful and method.period < NEVER):
                    self.note(f"{keep}/{name}", method, q, k, v, dense, call)

    def note(
        self, key: str, method: Method, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, call: Call
    ) -> None:
        kept, state = [], call.state.setdefault(key, {})
        alone = method.stateful and method.period == NEVER and not state
        mine = replace(call, keep=method.keep, state=state, refresh=False, note=kept.append)
        out = method(q, k, v, mine)
        if alone:  # its only full step says nothing about the window
            out = method(q, k, v, mine)
        share = 1.0 if kept[-1] is None else float(kept[-1].density())
        error = float((out - dense).norm() / dense.norm())
        self.entries[key].append((call.layer, call.step, share, error))


def measure(pipe, defaults, order: str, only: Sequence[str], keeps, size) -> dict[str, list]:
    books = Books(only, keeps)
    with accelerated(pipe, Probe(see=books.see), schedule=Schedule(), order=order, min_tokens=0):
        for prompt in PROMPTS:
            values = arguments(pipe, defaults, Request(prompt, seed=11, guidance=1.0, **size))
            pipe(**values, output_type="latent")
            print(f"{order}: {prompt}", file=sys.stderr)
    return books.entries


def summary(entries: list) -> dict:
    """Means over everything, and by layer and by step."""

    def mean(values) -> float:
        values = list(values)
        return round(sum(values) / len(values), 5)

    out = {"kept": mean(e[2] for e in entries), "error": mean(e[3] for e in entries)}
    for name, place in (("by_layer", 0), ("by_step", 1)):
        groups = sorted({e[place] for e in entries})
        out[name] = {g: mean(e[3] for e in entries if e[place] == g) for g in groups}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder or id; the embedded model when left out")
    parser.add_argument("--order", nargs="+", default=["raster", "tile"])
    parser.add_argument("--only", nargs="+", default=(), help="methods of the table, by name")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--side", type=int, help="of the picture, pixels; the model's own")
    parser.add_argument("--frames", type=int, help="the model's own")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/cpu-attention-error.json")
    )
    options = parser.parse_args()
    pipe, defaults = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    size = {"height": options.side, "width": options.side, "frames": options.frames}
    for order in options.order:
        found = measure(pipe, defaults, order, options.only, options.keeps, size)
        for key, entries in found.items():
            keep, _, name = key.partition("/")
            rows.append({"order": order, "keep": float(keep), "method": name, **summary(entries)})
    data = {
        "command": " ".join(["python", *sys.argv]),
        "model": options.model or EMBEDDED.name,
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "prompts": list(PROMPTS),
        "rows": rows,
    }
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    for row in rows:
        head = f"{row['order']:8}{row['keep']:5}  {row['method']:30}"
        print(f"{head}{row['kept']:7.3f}{row['error']:8.4f}")


if __name__ == "__main__":
    main()
