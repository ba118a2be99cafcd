"""All selectors in one table: the relative error of the attention output at equal keep.

    python benchmarks/selectors_table.py --out benchmarks/results/cpu-selectors.json

One dense generation runs; topk and pooled are computed by every selector on the q, k, v that its
layers were given, and compared: ‖O − O_dense‖ / ‖O_dense‖, mean over layers and over every
`every`th step. `kept` is what was read: a window is sized to come near to `keep`, what stands
beside scores (&) reads more, a threshold what lies above it. Orders of each head's tokens are tried
with `sub`. "each head its best" and "each head its best order" are chosen by the errors they are
judged by, from what reads exactly `keep` and stays the same at each call; a profile of another
prompt, --sorts "per-head(profile.json)", is judged by new ones. Written after the run, rows in the
order of pooled's error.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dit_accel import Pooled, Schedule, TopK, accelerated
from dit_accel.evaluate.probe import Probe
from dit_accel.forward.order import ORDERS
from dit_accel.generation.loading import EMBEDDED, load_pipeline
from dit_accel.generation.request import Request, arguments
from dit_accel.machine import describe
from dit_accel.methods import Call
from dit_accel.methods.selectors import find
from dit_accel.methods.selectors.window import Window
from dit_accel.methods.sorts import Sort

BASE = "sub"  # what the others have to beat
ORACLE = "sub(64)"  # the exact shares of blocks of 64
SIZED = "window"  # stands for one of the size that comes near to keep
SELECTORS = (
    "means", BASE, "sub(8)", ORACLE, "slash", "chunks", "valued", "regions", "tree", "relative",
    "relative(theta=4.8,parts=64,bits=4)", "nearest", "power", "shards", "axes", SIZED,
    "sub & window(t=1,h=3,w=3)",
)  # fmt: skip
SORTS = ("time", "tile", "hilbert", "clusters")
METHODS = {"topk": TopK, "pooled": Pooled}
BEST, BEST_ORDER = "each head its best", "each head its best order"


class Table:
    """Runs every selector, and `BASE` in every order, on what a layer was given; `entries` are
    (name, method, keep) → the errors, the shares read, and the squared errors of heads."""

    def __init__(
        self, selectors: list[str], keeps: list[float], every: int, sorts: Sequence[str] = ()
    ) -> None:
        self.selectors, self.sorts = selectors, [f"{BASE}, sort {sort}" for sort in sorts]
        self.keeps, self.every = keeps, every
        self.entries: dict[tuple[str, str, float], list[tuple[float, float, Tensor]]] = defaultdict(
            list
        )
        self.texts: dict[tuple[str, float], str] = {}
        self.steps = 1  # looks of each layer; known after the run

    def see(self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, call: Call) -> None:
        if call.step % self.every or not call.step:
            return
        norm = dense.float().square().sum()
        for name in [*self.selectors, *self.sorts]:
            for keep in self.keeps:
                text, _, sort = self.text(name, keep, q, k, call).partition(", sort ")
                for label, method in METHODS.items():
                    seen: list[Any] = []
                    mine = replace(call, keep=keep, state={}, together={}, note=seen.append)
                    out = method(keep, 64, select=text, sort=sort or "none")(q, k, v, mine)
                    lost = (out.float() - dense.float()).square().sum((0, 2, 3)) / norm
                    share = float(seen[-1].density())
                    row = (float(lost.sum().sqrt()), share, lost.cpu())
                    self.entries[name, label, keep].append(row)

    def text(self, name: str, keep: float, q: Tensor, k: Tensor, call: Call) -> str:
        """The selector's text; of `SIZED` that of the largest window which reads about `keep`."""
        if name == SIZED and (name, keep) not in self.texts:
            self.texts[name, keep] = str(sized(keep, q, k, call))
        return self.texts.get((name, keep), name)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each selector, method and keep."""
        rows = []
        for (name, method, keep), found in self.entries.items():
            facts = {"selector": name, "text": self.texts.get((name, keep), name)}
            facts |= {"method": method, "keep": keep, "kept": fmean(x[1] for x in found)}
            rows.append({**facts, "error": fmean(x[0] for x in found)})
        exact = [
            x for x in self.selectors
            if x not in (ORACLE, SIZED) and "&" not in x and not x.startswith("relative")
        ]  # fmt: skip
        fixed = [x for x in self.sorts if x.rpartition(" ")[2] in ORDERS]
        orders = [BASE] * (BASE in exact) + fixed
        return rows + self._best(BEST, exact) + self._best(BEST_ORDER, orders * bool(self.sorts))

    def _best(self, title: str, exact: list[str]) -> list[dict[str, Any]]:
        """Of each head that of `exact` which errs least in all looks."""
        rows = []
        for method in METHODS:
            for keep in self.keeps:
                looks = [self.entries[name, method, keep] for name in exact]
                if not looks:
                    continue
                lost = torch.stack([torch.stack([x[2] for x in found]) for found in looks])
                layers = lost.shape[1] // self.steps  # looks come step by step, layer by layer
                lost = lost.unflatten(1, (self.steps, layers))
                pick = lost.mean(1, keepdim=True).argmin(0, keepdim=True)
                error = lost.take_along_dim(pick.expand(1, *lost.shape[1:]), 0)[0].sum(-1).sqrt()
                facts = {"selector": title, "text": title, "method": method, "keep": keep}
                kept = fmean(x[1] for found in looks for x in found)
                rows.append({**facts, "kept": kept, "error": float(error.mean())})
        return rows


def sized(keep: float, q: Tensor, k: Tensor, call: Call) -> Window:
    """The window with the most tokens of those that read at most half a block more than `keep`."""
    if call.grid is None:
        raise ValueError("the tokens of this call form no grid: leave window out of --selectors")
    frames, *sides = call.grid
    most = keep + 0.5 / -(-k.shape[2] // 64)
    found = []
    for t in sorted({1, min(3, frames), frames}):
        for side in range(1, max(sides) + 1, 2):
            window = Window(t, side, side)
            read = float(window.mask(q, k, call, (64, 64)).mask.float().mean())
            if read <= most:
                found.append((t * min(side, sides[0]) * min(side, sides[1]), window))
    return max(found, key=lambda x: x[0])[1] if found else Window(1, 1, 1)


def measure(pipe: Any, values: dict[str, Any], table: Table, order: str) -> Table:
    """One dense generation, watched."""
    seen: set[tuple[int, int]] = set()

    def see(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, call: Call) -> None:
        if (call.step, call.layer) not in seen:  # of guidance passes the first
            seen.add((call.step, call.layer))
            table.see(q, k, v, dense, call)

    with accelerated(pipe, Probe(see=see), schedule=Schedule(), order=order, min_tokens=0):
        pipe(**values, output_type="latent")
    steps = {step for step, _ in seen if step and step % table.every == 0}
    table.steps = max(1, len(steps))
    return table


def show(rows: list[dict[str, Any]], keeps: list[float]) -> list[str]:
    """The table in Markdown; a selector that reads no more beats `BASE` where it errs less."""
    found = {(x["selector"], x["method"], x["keep"]): x for x in rows}
    cells = [(method, keep) for keep in keeps for method in METHODS]
    names = {x["selector"]: None for x in rows}
    head = [f"{method} {keep:.0%}" for method, keep in cells]
    lines = [
        f"| selector | {' | '.join(head)} | read | beats `{BASE}` |",
        "|---" * (len(cells) + 3) + "|",
    ]
    for name in sorted(names, key=lambda n: found[n, "pooled", keeps[0]]["error"]):
        mine = [found[name, *cell] for cell in cells]
        beats = ""
        if name != BASE and (BASE, *cells[0]) in found:
            pairs = [(x, found[BASE, *cell]) for x, cell in zip(mine, cells, strict=True)]
            less = sum(x["error"] < base["error"] for x, base in pairs)
            beats = "yes" if less == len(cells) else "no" if not less else f"in {less} columns"
            if any(x["kept"] > base["kept"] + 0.005 for x, base in pairs):
                beats = "reads more"
        errors = " | ".join(f"{x['error']:.3f}" for x in mine)
        read = ", ".join(f"{found[name, 'topk', keep]['kept']:.0%}" for keep in keeps)
        lines.append(f"| `{name}` | {errors} | {read} | {beats} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder or id; the embedded model when left out")
    parser.add_argument("--device")
    parser.add_argument("--prompt", default="rocket on a blue background")
    parser.add_argument("--guidance", type=float, default=1.0)
    for name in ("steps", "height", "width", "frames"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--order", default="raster")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--every", type=int, default=8, help="steps between two looks")
    parser.add_argument("--selectors", nargs="+", default=list(SELECTORS))
    parser.add_argument("--sorts", nargs="*", default=list(SORTS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for name in options.selectors:
        find(name)
    for name in options.sorts:
        Sort.read(name)
    pipe, defaults = load_pipeline(options.model, options.device)
    pipe.set_progress_bar_config(disable=True)
    size = {name: getattr(options, name) for name in ("steps", "height", "width", "frames")}
    asked = Request(options.prompt, seed=11, guidance=options.guidance, **size)
    table = Table(options.selectors, options.keeps, options.every, options.sorts)
    rows = measure(pipe, arguments(pipe, defaults, asked), table, options.order).rows()
    data = {
        "command": shlex.join(["python", *sys.argv]),
        "model": options.model or EMBEDDED.name,
        "machine": describe(pipe.device),
        "order": options.order,
        "rows": rows,
    }
    options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print("\n".join(show(rows, options.keeps)))


if __name__ == "__main__":
    main()
