"""Times of calls that take turns, and the error of one: what every row stands on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from dit_accel.table import BlockTable
from dit_accel.testing import assert_close, references


def times(
    runs: dict[str, Callable[[], object]], rounds: int, device: str, clock: str
) -> dict[str, float]:
    """Median milliseconds of each run; the runs take turns."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    for run in runs.values():
        run()
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = now()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seen[name].append(1e3 * (now() - start))
    return {name: statistics.median(values) for name, values in seen.items()}


def checked(
    op: str, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, out: Tensor
) -> tuple[float, str | None]:
    """Relative RMS error of a few query blocks of one head, and why the check failed, if it did."""
    reference = getattr(import_module(f"dit_accel.kernels.{op}.reference"), op)
    rows = sorted({0, table.query_blocks // 2, table.query_blocks - 1})
    places = torch.arange(table.n_q, device=q.device)
    here = torch.cat([places[r * table.block_q : (r + 1) * table.block_q] for r in rows])
    indices, counts = table.indices[:1, -1:, rows], table.counts[:1, -1:, rows]
    few = BlockTable(indices, counts, table.block_q, table.block_k, len(here), table.n_k)
    q, k, v, out = q[:1, -1:, here], k[:1, -1:], v[:1, -1:], out[:1, -1:, here]
    wide, same = references(reference, q, k, v, few)
    error = ((out.double() - wide).norm() / wide.double().norm()).item()
    try:
        assert_close(op, out, wide, same)
    except AssertionError as failure:
        return error, str(failure)
    return error, None
