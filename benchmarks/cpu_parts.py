"""What block-sparse attention on a CPU spends its time on, against dense attention.

    OMP_NUM_THREADS=1 python benchmarks/cpu_parts.py --out parts.json

Processor milliseconds of one thread, the least of some rounds: the rows of the table, the layout of
blocks, the gathering of kept keys and values, attention itself, and putting the outputs in place;
beside them dense attention times the kept share, which is what the arithmetic leaves.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel import ops
from dit_accel.kernels.block_sparse_attention import torch as kernel
from dit_accel.machine import describe
from dit_accel.table import BlockTable


def parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: BlockTable) -> dict[str, float]:
    """Milliseconds of each part of one call; the steps are those of the kernel itself."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = run()
        spent[name] += 1e3 * (time.process_time() - start)
        return found

    rows = timed("rows", lambda: kernel.Rows.of(table, None))
    q_blocks = timed("layout", lambda: kernel.as_blocks(q, table.block_q))
    keys, values = (timed("layout", lambda x=x: kernel.as_blocks(x, table.block_k)) for x in (k, v))
    out = timed("put", lambda: torch.zeros_like(q_blocks))
    scale = q.shape[-1] ** -0.5
    for chunk in rows.chunks(2 * keys[0].numel() * keys.element_size()):
        near = timed("gather", lambda c=chunk: (c.gather(keys), c.gather(values)))
        mine = q_blocks[chunk.rows]
        made = timed("attention", lambda m=mine, n=near: kernel._attend(m, *n, scale)[0])
        timed("put", lambda c=chunk, x=made: out.__setitem__(c.rows, x))
    made = timed("put", lambda: kernel.as_tokens(out, q.shape))
    torch.testing.assert_close(made, kernel.block_sparse_attention(q, k, v, table))
    return dict(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 16384])
    parser.add_argument("--block-q", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # the processor time of several is that of their waiting, too
    found = []
    for n in asked.tokens:
        q, k, v = (torch.randn(1, n, 4, 64).transpose(1, 2) for _ in range(3))
        start = time.process_time()
        F.scaled_dot_product_attention(q, k, v)
        dense = 1e3 * (time.process_time() - start)
        for block in asked.block_q:
            table = ops.block_table(q, k, asked.keep, block, 64)
            rounds = [parts(q, k, v, table) for _ in range(asked.rounds)]
            row: dict[str, Any] = {name: min(r[name] for r in rounds) for name in rounds[0]}
            whole, share = sum(row.values()), table.density().item()
            row |= {"whole": whole, "dense": dense, "left": dense * share, "ratio": dense / whole}
            row = {name: round(value, 1) for name, value in row.items()}
            found.append({"tokens": n, "block_q": block, **row})
            print(json.dumps(found[-1]), flush=True)
    if asked.out:
        data = {"machine": describe("cpu"), "rows": found}
        asked.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
