"""What limits each kernel: Nsight Compute over one call of each operator.

    python benchmarks/gpu_ncu.py --out ncu.json        a minute and a half; needs `ncu`

The script starts itself under ncu, which profiles what runs after a first, unprofiled round. Clocks
are left as they are (--clock-control none).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_run import SHAPES, environment

from dit_accel import ops

KEEP, BLOCKS = 0.05, (128, 64)
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats")
METRICS = (
    *("Duration", "Compute (SM) Throughput", "DRAM Throughput", "L1/TEX Cache Throughput"),
    *("L2 Cache Throughput", "Executed Ipc Active", "Issue Slots Busy", "SM Busy"),
    *("Achieved Occupancy", "Registers Per Thread", "Warp Cycles Per Issued Instruction"),
)


def calls(shape: tuple[int, ...]) -> None:
    """Every operator once: table, sparse, pooled, rectified, SLA, int8, and two backwards."""
    torch.manual_seed(0)
    batch, heads, n, d = shape
    q, k, v = (  # [B, H, N, D] as diffusers gives it
        torch.randn(batch, n, heads, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    weight = torch.eye(d, device="cuda")
    with torch.no_grad():
        table = ops.block_table(q, k, keep=KEEP, block_q=BLOCKS[0], block_k=BLOCKS[1])
        square = ops.block_table(q, k, keep=KEEP, block_q=BLOCKS[1], block_k=BLOCKS[1])
        ops.block_sparse_attention(q, k, v, table)
        ops.pooled_attention(q, k, v, table)
        ops.rectified_attention(q, k, v, table)
        ops.sparse_linear_attention(q, k, v, table, weight)
        ops.block_sparse_attention(q, k, v, table, precision="int8")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ops.block_sparse_attention(*leaves, square)
    torch.autograd.grad(out, leaves, torch.randn_like(out))  # that of a sum has strides of zero
    torch.cuda.synchronize()


def parsed(text: str) -> list[dict[str, Any]]:
    """One record for each kernel of ncu's CSV, in the order in which they ran."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"][:100]})
        if row["Metric Name"] in METRICS:
            kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(kernels.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="wan1.3b-480p")
    parser.add_argument("--only", default="kernel", help="a pattern of the kernels' names")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.child:
        calls(shape)
        torch.cuda.profiler.start()
        calls(shape)
        torch.cuda.profiler.stop()
        return
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [
        "-k",
        f"regex:{options.only}",
        sys.executable,
        __file__,
        "--child",
        "--shape",
        options.shape,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        kernels = parsed(done.stdout)
    except StopIteration:
        sys.exit(f"ncu gave no table (exit {done.returncode}): {done.stdout[-600:]}{done.stderr}")
    record = {
        "environment": environment(),
        "command": shlex.join(["python", *sys.argv]),
        "ncu": " ".join(command[:-5]),
        "shape": shape, "keep": KEEP, "blocks": BLOCKS,
        "backward_blocks": (BLOCKS[1], BLOCKS[1]), "dtype": "bfloat16",
        "kernels": kernels,
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for kernel in kernels:
        print(kernel["kernel"][:60], kernel.get("Duration"), kernel.get("SM Busy"))


if __name__ == "__main__":
    main()
