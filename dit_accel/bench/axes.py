"""Pattern × length × ranks: what a kernel costs at tables of one kept share and different shape.

    python -m dit_accel.bench --pattern topk top-p --length 8k 32k --ranks 1 4 --out axes.json

The axes of the long-context attention benchmark, for bidirectional block-sparse attention. All
patterns of one length and share take turns with dense attention of the same share. A ratio is that
of attention alone, without the choice of blocks, and stands only if the error check passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import ops
from dit_accel.bench import baselines, operators, patterns
from dit_accel.bench.axes_table import line
from dit_accel.bench.measure import checked, times
from dit_accel.bench.ranks import Share, Way, fullest
from dit_accel.bench.results import store
from dit_accel.bench.shapes import SHAPES, Shape
from dit_accel.machine import is_out_of_memory
from dit_accel.ops import dispatch
from dit_accel.table import BlockTable

LENGTHS = {"cpu": (4096, 8192), "cuda": (8192, 32768, 131072, 262144)}
SHAPE = {"cpu": "cpu-4k", "cuda": "wan1.3b-480p"}  # whose heads are taken, at every length


@dataclass(frozen=True)
class Axes:
    """What is timed: every pattern at every length, in every share of so many ranks.

    shapes: names in SHAPES whose batch and heads are taken. ops: names in operators.OPS.
    """

    shapes: Sequence[str]
    patterns: Sequence[str]
    lengths: Sequence[int]
    ranks: Sequence[int] = (1,)
    keeps: Sequence[float] = (0.1,)
    ops: Sequence[str] = operators.OPS[:1]
    dtype: torch.dtype = torch.float32
    block: int = 64
    rounds: int = 5
    clock: str = "wall"

    def __post_init__(self) -> None:
        operators.check_names(self.ops, self.shapes)
        for name in self.patterns:
            patterns.check(name)
        for n in self.lengths:
            if n < self.block:
                raise ValueError(f"a length is at least a block of {self.block} tokens, not {n}")
        for ranks in self.ranks:
            Way.all_of(ranks)


def run_axes(
    axes: Axes,
    device: str,
    out: str | Path | None = None,
    echo: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row for each op, pattern, length, number of ranks and way of sharing; a group that does
    not fit into memory has an `error` instead of times. `out` is rewritten after each group."""
    rows: list[dict[str, Any]] = []
    for shape in (replace(SHAPES[name], n=n) for name in axes.shapes for n in axes.lengths):
        for keep in axes.keeps:
            for row in _of_length(axes, shape, keep, device):
                rows.append(row)
                echo(line(row))
            if out is not None:
                store(rows, out)
    return rows


def _of_length(axes: Axes, shape: Shape, keep: float, device: str) -> Iterator[dict[str, Any]]:
    size = (shape.batch, shape.n, shape.heads, shape.head_dim)
    chance = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(size, device=device, dtype=axes.dtype, generator=chance).transpose(1, 2)
        for _ in range(3)
    )
    tables = {name: patterns.table(name, q, k, keep, axes.block) for name in axes.patterns}
    for ranks in axes.ranks:
        for way in Way.all_of(ranks):
            try:
                yield from _of_way(axes, shape, keep, way, tables, (q, k, v))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                told = {"shape": asdict(shape), "ranks": way.ranks, "way": way.name, "keep": keep}
                yield {**told, "error": "does not fit into memory", "check": "not run"}


def _of_way(
    axes: Axes,
    shape: Shape,
    keep: float,
    way: Way,
    tables: dict[str, BlockTable],
    tensors: tuple[Tensor, Tensor, Tensor],
) -> Iterator[dict[str, Any]]:
    """The rows of one length and way: all patterns beside dense attention, each of the share of the
    rank that has most to do."""
    shares, device = way.shares(shape.heads, shape.n, axes.block), tensors[0].device.type
    for op in axes.ops:
        cells = {
            name: _Cell.of(op, name, fullest(shares, whole, way.ranks), shares, tensors, whole)
            for name, whole in tables.items()
        }
        runs: dict[str, Callable[[], Any]] = {}
        for cell in cells.values():
            runs |= cell.runs
        took = times(runs, axes.rounds, device, axes.clock)
        for name, cell in cells.items():
            yield {
                "op": op,
                "pattern": name,
                "shape": asdict(shape),
                "ranks": way.ranks,
                "way": way.name,
                "received_mib": round(way.received(tensors[0]) / 2**20, 3),
                "dtype": str(axes.dtype).removeprefix("torch."),
                "device": device,
                "implementation": cell.implementation,
                "clock": axes.clock,
                "threads": torch.get_num_threads(),
                "block": axes.block,
                "keep": keep,
                "density": round(tables[name].density().item(), 4),
                **cell.measured(took),
            }


@dataclass(frozen=True)
class _Cell:
    """One pattern in the share of one rank.

    balance: kept blocks of this rank against the mean of all. runs: what is timed, by names that
    begin with the rank for dense attention, which several patterns may have in common, and with the
    pattern for what reads the table.
    """

    pattern: str
    rank: int
    balance: float
    runs: dict[str, Callable[[], Any]]
    absent: dict[str, str]
    errors: dict[str, float]
    error: float
    failure: str | None
    work: float
    implementation: str

    @classmethod
    def of(
        cls,
        op: str,
        pattern: str,
        fullest: tuple[int, float],
        shares: list[Share],
        tensors: tuple[Tensor, Tensor, Tensor],
        whole: BlockTable,
    ) -> _Cell:
        rank, balance = fullest
        q, k, v = shares[rank].of(*tensors)
        table = shares[rank].table(whole)
        attend = partial(getattr(ops, op), q, k, v, table)
        found: dict[str, Callable[[], Any]] = {
            "dense": partial(F.scaled_dot_product_attention, q, k, v)
        }
        absent: dict[str, str] = {}
        if operators.extras(q.device.type):
            more, absent = baselines.gpu(q, k, v, table, flex=False)
            found |= more
        runs = {f"{rank if n in baselines.DENSE else pattern}/{n}": r for n, r in found.items()}
        errors = operators.errors(found, ops.block_sparse_attention(q, k, v, table))
        block, pairs = table.block_q, q[..., 0].numel() * k.shape[2]
        return cls(
            pattern,
            rank,
            balance,
            {**runs, f"{pattern}/attention": attend},
            absent,
            errors,
            *checked(op, q, k, v, table, attend()),
            4 * table.density().item() * pairs * q.shape[-1],
            dispatch.select(op, q, block_q=block, block_k=block).name,
        )

    def measured(self, took: dict[str, float]) -> dict[str, Any]:
        """What the row has of it."""
        mine = {name.partition("/")[2]: took[name] for name in self.runs}
        best = min((n for n in baselines.DENSE if n in mine), key=mine.__getitem__)
        return {
            "rank": self.rank,
            "balance": round(self.balance, 3),
            **{f"{name}_ms": round(ms, 3) for name, ms in mine.items()},
            **{f"{name}_absent": reason for name, reason in self.absent.items()},
            **{f"{name}_error": error for name, error in self.errors.items()},
            "dense_best": best,
            "ratio": None if self.failure else round(mine[best] / mine["attention"], 2),
            "kept_tflops": round(self.work / mine["attention"] / 1e9, 3),
            "relative_error": self.error,
            "check": self.failure or "passed",
        }
