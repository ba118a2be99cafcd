r"""One run on a lent GPU: what methods cost beside their kernels, and the methods of tiles.

    python benchmarks/gpu_rest.py --out rest.json                  three minutes on an H200
    python benchmarks/gpu_rest.py --out /tmp/x.json --dry-run      tiny shapes, interpreted

First --workers processes share all cases, which compiles what will be timed; then the times are
taken, alone on the GPU: medians in milliseconds of whole calls of a method, table included. Each
case is written as it ends, with its error if it failed. Memory errors in the levels:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes all --tool memcheck \
        python benchmarks/gpu_rest.py --out /tmp/x.json --match levels --workers 0
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_run import SHAPES, Plan, Run, shared, wait_for_go
from gpu_select import check_parts, parts_of_tokens
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel import SLA, SSTA, VSA, Pooled, TopK, ops
from dit_accel.forward.order import Grid, token_order
from dit_accel.kernels import launch
from dit_accel.methods import Call, Method
from dit_accel.methods.budget import Profile
from dit_accel.methods.selectors import find
from dit_accel.methods.sorts import fixed, put
from dit_accel.table import BlockTable

GRIDS: dict[str, Grid] = {"wan1.3b-480p": (21, 30, 52), "wan14b-720p": (21, 45, 80)}
TINY, TINY_GRID = (1, 2, 240, 64), (3, 8, 10)
KEEP = 0.05
SELECTORS = (
    "means", "sub", "sub(8)", "regions", "tree", "slash", "chunks", "valued", "relative",
    "learned", "learned(span=4)", "nearest", "power", "shards", "axes", "window(t=3,h=8,w=8)",
    "sub & window(t=1,h=8,w=8)", "per-head(PROFILE)",
)  # fmt: skip
BRANCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, rest": {"linear": "rest"},
    "rms": {"branch": "rms"},
    "conv": {"branch": "conv"},
    "gated & rms": {"branch": "gated & rms"},
    "gated, relu": {"branch": "gated", "feature_map": "relu"},
    "rala & rms": {"branch": "rala & rms"},
    "linear_layers": {"linear_layers": (0,)},
    "gated": {"branch": "gated"},
    "rala": {"branch": "rala"},
    "memory": {"branch": "memory"},
    "latents": {"branch": "latents"},
    "latents, rest": {"branch": "latents", "linear": "rest"},
    "decay": {"branch": "decay"},
}
FUSED = ("plain", "rms", "conv", "gated & rms", "linear_layers")


class Inputs:
    """q, k and v of a shape, neighbours alike, and the circumstances of a call."""

    def __init__(self, r: Run, shape: tuple[int, ...], grid: Grid) -> None:
        _, heads, n, d = shape
        self.q, self.k = parts_of_tokens(r, heads, n, d)
        self.v, self.grid = r.tokens(*shape), grid

    def call(self, keep: float = KEEP, **more: Any) -> Call:
        return Call(keep=keep, grid=self.grid, steps=50, **more)

    def ms(self, r: Run, method: Method, **more: Any) -> float:
        call = self.call(method.keep, **more)
        return self.among(r, lambda: method(self.q, self.k, self.v, call))

    def among(self, r: Run, fn: Callable[[], Any]) -> float:
        """Milliseconds of a call among others, as in a model: alone a short one waits for Python's
        launches, 0.5 ms at 32,760 tokens."""
        count = 1 if r.dry or r.once or self.q.shape[2] > 40000 else 8

        def row() -> None:
            for _ in range(count):
                fn()

        return r.ms(row) / count

    def error(self, found: Tensor, table: BlockTable | None = None) -> float:
        """‖found − O‖ / ‖O‖ of 64 queries in float32, O over all keys or those of the table."""
        rows = torch.linspace(0, found.shape[2] - 1, 64, device=found.device).long()
        scores = self.q[:, :, rows].float() @ self.k.float().mT * found.shape[3] ** -0.5
        if table is not None:
            mask = table.to_mask()[:, :, rows // table.block_q]
            mask = mask.repeat_interleave(table.block_k, 3)[..., : scores.shape[3]]
            scores = scores.masked_fill(~mask, -torch.inf)
        exact = scores.softmax(-1) @ self.v.float()
        return ((found[:, :, rows].float() - exact).norm() / exact.norm()).item()


def reuse_times(r: Run, x: Inputs, keep: float, kinds: tuple[type[Method], ...]) -> dict[str, Any]:
    """A call of eight, with a table made at each of them, at every fourth, or once."""
    ms, us = {}, {}
    for kind, select, every in product(kinds, ("means", "sub"), (1, 4, 8)):
        method = kind(keep, select=select, reuse="none" if every == 1 else str(every))
        name = f"{method.name} {select}, a table for {every}"

        def eight(method: Method = method) -> None:
            state: dict[str, Any] = {}
            for step in range(8):
                method(x.q, x.k, x.v, x.call(keep, step=step, state=state))

        ms[name] = r.ms(eight) / 8
        if x.q.shape[2] < 40000:
            us[name] = r.us(eight) / 8
    return {"ms": ms, "us": us}


def tile_times(r: Run, x: Inputs, keep: float) -> dict[str, Any]:
    """VSA and SSTA, their tokens laid out before, beside topk at the share of pairs they read."""
    ms, read = {}, {}
    rows: dict[str, tuple[Method, dict[str, Any]]] = {
        "vsa, with its gate": (VSA(keep), {"gate": x.v}),
        "vsa": (VSA(keep), {}),
        "ssta, no window": (SSTA(keep, most=10**6, window=(1, 1, 1)), {}),
    }
    if keep == KEEP:
        rows["ssta as published"] = (SSTA(), {})
        with sdpa_kernel(SDPBackend.MATH if r.dry else SDPBackend.CUDNN_ATTENTION):
            dense = partial(torch.nn.functional.scaled_dot_product_attention, x.q, x.k, x.v)
            ms["dense, cuDNN"] = x.among(r, dense)
    for name, (method, more) in rows.items():
        seen: list[BlockTable] = []
        order = token_order("tile", x.grid, method.layout)
        ms[name] = x.ms(r, method, index=order, note=seen.append, **more)
        pairs = seen[-1].counts.sum().item() * seen[-1].block_q * seen[-1].block_k
        read[name] = pairs / (x.q.shape[1] * x.q.shape[2] ** 2)
        for block_q in (64, 128) if "gate" not in more else ():
            alike = TopK(min(1.0, read[name]), block_q)
            ms[f"topk, {block_q} queries, as many pairs as {name}"] = x.ms(r, alike)
    for block_q, select in product((64, 128), ("means", "sub")):
        ms[f"topk/{select}, {block_q} queries"] = x.ms(r, TopK(keep, block_q, select=select))
    return {"ms": ms, "read": read}


def tail_times(r: Run, x: Inputs) -> dict[str, Any]:
    """Pooled with means and with lines, and its distance to dense attention."""
    ms, error = {}, {}
    for keep, tail in product((0.05, 0.1, 0.15, 0.2), ("mean", "line")):
        method, name = Pooled(keep, tail=tail), f"{tail} at {keep}"
        ms[name] = x.ms(r, method)
        error[name] = x.error(method(x.q, x.k, x.v, x.call(keep)))
    return {"ms": ms, "relative_error": error}


@contextmanager
def plain_forward(lazy: float) -> Iterator[None]:
    """The forward kernel without Hopper's roles, rescaling where a maximum grew by 2^lazy."""
    rows = launch.LAUNCHES
    plain = [x for x in rows if x.op != "forward" or not x.specialized]
    launch.LAUNCHES = tuple(replace(x, lazy=lazy) if x.op == "forward" else x for x in plain)
    launch.find.cache_clear()
    try:
        yield
    finally:
        launch.LAUNCHES = rows
        launch.find.cache_clear()


def lazy_times(r: Run, x: Inputs) -> dict[str, Any]:
    """The plain forward kernel at one table, and its error against float32 at that table."""
    ms, error = {}, {}
    for block_q in (64, 128):
        table = ops.block_table(x.q, x.k, KEEP, block_q, 64)
        for lazy in (0.0, 8.0):
            with plain_forward(lazy):
                run = partial(ops.block_sparse_attention, x.q, x.k, x.v, table)
                ms[f"{block_q} queries, lazy {lazy:g}"] = x.among(r, run)
                error[f"{block_q} queries, lazy {lazy:g}"] = x.error(run(), table)
    return {"ms": ms, "relative_error": error}


def learned(method: Any, x: Inputs) -> dict[str, Tensor]:
    """A layer's tensors, none of them zero: time does not depend on them."""
    heads, d = x.q.shape[1], x.q.shape[3]
    fresh = method.fresh_of(0, heads, d, heads * d)
    draw = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(y.shape, generator=draw) for name, y in fresh.items()}
    return {name: (y + noise[name] * d**-0.5).to(x.q.device) for name, y in fresh.items()}


def branch_times(r: Run, x: Inputs, name: str) -> dict[str, Any]:
    """SLA with this branch, and the bytes that a call allocates, its result included."""
    method = SLA(KEEP, **BRANCHES[name])
    tensors = {f"layers.0.{part}": y for part, y in learned(method, x).items()}
    method = method.with_weights(tensors)
    call = x.call(gate=x.v.contiguous() if method.reads_input else None)
    run = partial(method, x.q, x.k, x.v, call)
    return {"ms": x.among(r, run), "peak_bytes": r.peak(run)}


def selector_times(r: Run, x: Inputs, text: str, folder: Path) -> dict[str, Any]:
    """The table by this selector, blocks of 128 × 64, and its kernels alone; what it reads."""
    if "PROFILE" in text:
        path, heads = folder / "per-head.json", x.q.shape[1]
        curves = {
            name: {"0": [{str(KEEP): float((h + n) % 2)} for h in range(heads)]}
            for n, name in enumerate(("means", "sub"))
        }
        Profile("topk", curves, {}, {}).save(path)
        text = text.replace("PROFILE", str(path))
    selector, sizes = find(text), (64 if r.dry else 128, 64)
    parts = None
    if selector.tensors:
        parts = learned(SLA(KEEP, select=selector), x)
    call = x.call(values=x.v, learned=parts)
    run = partial(selector.choose, x.q, x.k, call, sizes)
    found = {"ms": x.among(r, run), "us": r.us(run), "peak_bytes": r.peak(run)}
    return found | {"read": run()[0].density().item()}


def order_times(r: Run, x: Inputs, width: int) -> dict[str, Any]:
    """Gathers: of each call where heads are sorted, and once a step where all tokens are."""
    n, ms = x.q.shape[2], {"topk": x.ms(r, TopK(KEEP))}
    hidden = torch.randn(1, n, width, device=r.device, dtype=r.dtype)
    out = torch.randn(1, n, 64, device=r.device, dtype=r.dtype)
    kinds = ("time", "tile", "hilbert")
    mixed = tuple(kinds[h % 3] for h in range(x.q.shape[1]))
    for name, orders in (*((kind, (kind,)) for kind in kinds), ("each head its own", mixed)):
        way = fixed(orders, x.grid, None, 0, n, torch.device(r.device))

        def four(way: Any = way) -> None:
            for tokens, index in ((x.q, way.queries), (x.k, way.keys), (x.v, way.keys)):
                put(tokens, index)
            put(x.q, way.back)

        ms[f"four gathers, {name}"] = x.among(r, four)
        if name in kinds:
            ms[f"topk, sort {name}"] = x.ms(r, TopK(KEEP, sort=name))
            ms[f"once a step, order {name}"] = x.among(
                r,
                lambda w=way: (
                    hidden.index_select(1, w.queries[0, 0]),
                    out.index_select(1, w.back[0, 0]),
                ),
            )
    return {"ms": ms}


def plan(r: Run) -> Plan:
    """The cases, the most telling first."""
    shapes = {"tiny": TINY} if r.dry else SHAPES
    grids = {"tiny": TINY_GRID} if r.dry else GRIDS
    made: dict[str, Inputs] = {}

    def of(name: str) -> Inputs:
        if name not in made:
            made.clear()  # one shape at a time
            made[name] = Inputs(r, shapes[name], grids[name])
        return made[name]

    found: Plan = []
    first = next(iter(shapes))
    for name, keep in product(shapes, (0.05, 0.1)):
        kinds = (TopK, Pooled) if name == first else (TopK,)
        found.append((f"reuse {name} at {keep}",
                      lambda n=name, a=(keep, kinds): reuse_times(r, of(n), *a)))  # fmt: skip
        found.append((f"tiles {name} at {keep}", lambda n=name, k=keep: tile_times(r, of(n), k)))
    for name in shapes:
        found.append((f"lazy {name}", lambda n=name: lazy_times(r, of(n))))
        found.append((f"tail {name}", lambda n=name: tail_times(r, of(n))))
    for name, branch in product(shapes, BRANCHES):
        if name == first or branch in FUSED:
            label = f"branch {name}: {branch}"
            found.append((label, lambda n=name, b=branch: branch_times(r, of(n), b)))
    folder = r.path.parent
    for text in SELECTORS:
        label = f"selector {first}: {text}"
        found.append((label, lambda t=text: selector_times(r, of(first), t, folder)))
    for name in shapes:
        width = shapes[name][1] * shapes[name][3]
        found.append((f"orders {name}", lambda n=name, w=width: order_times(r, of(n), w)))
    for block_q in (64,) if r.dry else (64, 128):
        args = (200 if r.dry else 1000, 64 if r.dry else 128, block_q, 4, 130)
        found.append((f"levels, memory {block_q}", lambda a=args: check_parts(r, *a)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=150, help="seconds for the times")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile; 0: none")
    parser.add_argument("--part", choices=["all", "compile", "times"], default="all")
    parser.add_argument("--match", default="", help="only cases with this pattern in their name")
    parser.add_argument("--wait", action="store_true", help="for gpu_all.py: wait for the turn")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, in the interpreter")
    options = parser.parse_args()
    torch.manual_seed(0)
    r = Run(options.out, options.budget, options.dry_run, once=options.shard is not None)
    cases = [case for case in plan(r) if re.search(options.match, case[0])]
    with torch.no_grad():
        if options.shard:
            part, parts = map(int, options.shard.split("/"))
            for name, fn in cases[part::parts]:
                r.case(name, fn)
            return
        if options.part != "times" and options.workers:
            shared(__file__, options, 100)
            print(f"compiled after {time.monotonic() - r.start:.0f} s", flush=True)
        if options.part != "compile":
            wait_for_go(r, options.wait)
            for name, fn in cases:
                r.case(name, fn)
    failed = [line["case"] for line in r.cases if "error" in line]
    print(f"{len(r.cases)} cases, {len(failed)} failed: {failed}")
    print("done", flush=True)


if __name__ == "__main__":
    main()
