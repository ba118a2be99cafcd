r"""One run on a lent GPU: the choice of blocks by parts beside that by means, and unequal rows.

    python benchmarks/gpu_select.py --out results.json            two minutes on an H200
    python benchmarks/gpu_select.py --out /tmp/x.json --dry-run   tiny shapes, interpreted

First --workers processes share all cases: they check, and compile what will be timed. Then the
times are taken, alone on the GPU: medians in milliseconds. Each case is written as it ends, with
its error if it failed; no case starts after --budget seconds.
"""

from __future__ import annotations

import argparse
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_run import SHAPES, Plan, Run, shared
from torch import Tensor

from dit_accel import ops
from dit_accel.kernels import launch
from dit_accel.kernels.block_sparse_attention import triton as sparse
from dit_accel.kernels.block_table import torch as plain
from dit_accel.kernels.block_table import triton as tables
from dit_accel.kernels.pooled_attention import triton as pooled
from dit_accel.table import BlockTable, block_count


def parts_of_tokens(r: Run, heads: int, n: int, d: int) -> list[Tensor]:
    """q and k whose neighbours are alike, as a picture's are, and whose attention is uneven."""
    rough = (torch.randn(1, n // 16 + 1, heads, d, device=r.device) for _ in range(2))
    whole = (1.5 * x.repeat_interleave(16, 1)[:, :n] for x in rough)
    return [(x + torch.randn_like(x) / 2).to(r.dtype).transpose(1, 2) for x in whole]


def check_parts(
    r: Run, n: int, d: int, block_q: int, parts: int, kv_len: int | None
) -> dict[str, Any]:
    """The attention that the chosen blocks hold, by the scores of float32 means, against the best:
    what bfloat16 parts lose of it. The block means are those of one part."""
    q, k = parts_of_tokens(r, 2, n, d)
    options = {"kv_len": kv_len, "return_means": True, "spreads": True}
    table, means = tables.block_table(q, k, 0.1, block_q, 64, parts=parts, **options)
    _, whole = tables.block_table(q, k, 0.1, block_q, 64, **options)
    for name in ("q", "k", "q_far", "k_far"):
        torch.testing.assert_close(getattr(means, name), getattr(whole, name))
    scores = plain.part_scores(q, k, block_q, 64, kv_len, d**-0.5, parts)
    best = scores.topk(int(table.counts.max())).values.sum(-1)
    mask = table.to_mask()[..., : scores.shape[-1]]
    lost = 1 - (scores * mask).sum(-1) / best
    assert lost.max() < 5e-3 and (table.counts == table.counts.max()).all(), lost.max()
    exact = ops.choose_blocks(scores, 0.1, n, scores.shape[-1] * 64, block_q, 64)
    differ = (exact.to_mask() != mask).any(-1).float().mean()
    return {"worst_row_loses": lost.max().item(), "rows_that_differ": differ.item()}


def check_heads(r: Run, n: int) -> dict[str, Any]:
    """Shares of heads against each head alone."""
    q, k = parts_of_tokens(r, 3, n, 128)
    shares = (0.05, 0.4, 0.15)
    for parts in (1, 4):
        table = ops.block_table(q, k, shares, 128, 64, parts=parts)
        for h, share in enumerate(shares):
            alone = ops.block_table(q, k, share, 128, 64, parts=parts)
            assert torch.equal(table.to_mask()[:, h], alone.to_mask()[:, h])
    return {"checked": "shares of heads"}


@contextmanager
def levels_by(**options: Any):
    """The launch table with other rows for the levels."""
    rows = launch.LAUNCHES
    launch.LAUNCHES = tuple(replace(row, **options) if row.op == "levels" else row for row in rows)
    launch.find.cache_clear()
    try:
        yield
    finally:
        launch.LAUNCHES = rows
        launch.find.cache_clear()


def table_times(r: Run, shape: tuple[int, ...], block_q: int) -> dict[str, Any]:
    """The table by means and by parts, and pooled attention with each; kernels in microseconds."""
    q, k = (r.tokens(*shape) for _ in range(2))
    v, ms, us = r.tokens(*shape), {}, {}
    for keep, parts in product((0.05,), (1, 2, 4, 8)):
        call = partial(tables.block_table, q, k, keep, block_q, 64, parts=parts)
        name = f"table, {parts} parts"
        ms[name], us[name] = r.ms(call), r.kernels(call)

        def whole(parts: int = parts, keep: float = keep) -> Tensor:
            options = {"parts": parts, "return_means": True}
            table, means = tables.block_table(q, k, keep, block_q, 64, **options)
            return pooled.pooled_attention(q, k, v, table, k_mean=means.k)

        ms[f"pooled, {parts} parts"] = r.ms(whole)
        ms[f"table, {parts} parts, graph"] = r.graph_ms(call)
    return {"ms": ms, "us": us}


def level_times(r: Run, shape: tuple[int, ...], block_q: int) -> dict[str, Any]:
    """The table by four parts with other launches, and other memory for the levels."""
    q, k = (r.tokens(*shape) for _ in range(2))
    ms, memory = {}, tables._LEVEL_BYTES
    call = partial(tables.block_table, q, k, 0.05, block_q, 64, parts=4)
    for block, tile, warps, stages in (
        (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3),
        (64, 128, 4, 2), (64, 64, 4, 3), (128, 128, 4, 2),
    ):  # fmt: skip
        if block < block_q:  # such a row serves smaller blocks alone
            continue
        with levels_by(block=block, tile=tile, warps=warps, stages=stages):
            ms[f"{block} x {tile}, {warps} warps, {stages} stages"] = r.ms(call)
    for bits in (24, 26, 27, 28):
        tables._LEVEL_BYTES = 2**bits
        ms[f"levels of {2**bits} bytes"] = r.ms(call)
    tables._LEVEL_BYTES = memory
    return {"ms": ms}


def uneven(r: Run, shape: tuple[int, ...], block_q: int, kind: str) -> BlockTable:
    """A table that keeps a twentieth: of equal rows, of unequal heads, or of unequal rows."""
    rows, columns = block_count(shape[2], block_q), block_count(shape[2], 64)
    spread = torch.ones(shape[1], rows, device=r.device)
    if kind != "equal rows":
        spread = spread * torch.randn(shape[1], 1, device=r.device).mul(0.8).exp()
    if kind == "unequal rows":
        spread = spread * torch.randn(shape[1], rows, device=r.device).mul(0.6).exp()
    total = round(0.05 * columns) * spread.numel()
    counts = (spread / spread.sum() * total).round().clamp(1, columns).long()
    scores = torch.rand(1, *counts.shape, columns, device=r.device)
    order = scores.argsort(-1)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(columns, device=r.device).expand_as(order)
    )
    mask, sizes = rank < counts[None, ..., None], (block_q, 64, shape[2], shape[2])
    return replace(BlockTable.from_mask(mask, *sizes), uneven=kind != "equal rows")


def row_times(r: Run, shape: tuple[int, ...], block_q: int) -> dict[str, Any]:
    """Sparse and pooled attention over equal and unequal rows; nanoseconds of a kept block pair, so
    that tables of nearly the same total compare."""
    q, k, v = (r.tokens(*shape) for _ in range(3))
    found: dict[str, Any] = {"ms": {}, "ns_of_a_pair": {}, "kept_pairs": {}}
    ops_of = {"sparse": sparse.block_sparse_attention, "pooled": pooled.pooled_attention}
    for kind in ("equal rows", "unequal heads", "unequal rows"):
        table = uneven(r, shape, block_q, kind)
        pairs = found["kept_pairs"][kind] = int(table.counts.sum())
        for name, op in ops_of.items():
            ms = found["ms"][f"{name}, {kind}"] = r.ms(partial(op, q, k, v, table))
            found["ns_of_a_pair"][f"{name}, {kind}"] = 1e6 * ms / pairs
    return found


def checks(r: Run) -> Plan:
    lengths = (200,) if r.dry else (63, 1000, 4100, 32760)
    plan: Plan = [("check heads", lambda n=lengths[-1]: check_heads(r, min(n, 4100)))]
    for n, d, block_q, parts in product(lengths, (64, 128), (64, 128), (2, 4, 16, 64)):
        if n * parts <= 16 * 32760 and not (r.dry and (parts > 4 or block_q == 128)):
            for kv_len in (None, n // 2 + 3):
                name = f"check {n} d{d} block_q {block_q} parts {parts} kv_len {kv_len}"
                plan.append((name, lambda a=(n, d, block_q, parts, kv_len): check_parts(r, *a)))
    return plan


def timings(r: Run) -> Plan:
    shapes = {"tiny": (1, 2, 200, 64)} if r.dry else SHAPES
    plan: Plan = []
    for (name, shape), block_q in product(shapes.items(), (64, 128)):
        plan.append((f"table {name} block_q {block_q}", partial(table_times, r, shape, block_q)))
    half = {} if r.dry else {"wan1.3b-480p, half its heads": (1, 6, 32760, 128)}
    for (name, shape), block_q in product((shapes | half).items(), (128, 64)):
        plan.append((f"rows {name} block_q {block_q}", partial(row_times, r, shape, block_q)))
    for (name, shape), block_q in product(shapes.items(), (64, 128)):
        plan.append((f"levels {name} block_q {block_q}", partial(level_times, r, shape, block_q)))
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=200, help="seconds for the times")
    parser.add_argument("--workers", type=int, default=12, help="processes that check and compile")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, in the interpreter")
    options = parser.parse_args()
    torch.manual_seed(0)
    r = Run(options.out, options.budget, options.dry_run, once=options.shard is not None)
    if options.shard:
        part, parts = map(int, options.shard.split("/"))
        for name, fn in (checks(r) + timings(r))[part::parts]:
            r.case(name, fn)
        return
    for line in shared(__file__, options):
        if line["case"].startswith("check") or "error" in line:
            r.add(line)
    print(f"checked and compiled after {time.monotonic() - r.start:.0f} s", flush=True)
    for name, fn in timings(r):
        r.case(name, fn)
    failed = [line["case"] for line in r.cases if "error" in line]
    print(f"{len(r.cases)} cases, {len(failed)} failed: {failed}")


if __name__ == "__main__":
    main()
