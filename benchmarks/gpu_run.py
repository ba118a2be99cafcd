"""What the GPU scripts share: cases that are written as they end, medians, random tables."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import triton
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dit_accel.table import BlockTable, block_count

SHAPES = {"wan1.3b-480p": (1, 12, 32760, 128), "wan14b-720p": (1, 40, 75600, 128)}
SECONDS = 150  # of the processes that share the cases
Plan = list[tuple[str, Callable[[], dict[str, Any]]]]


class Run:
    """The cases of one run, written to `path` after each."""

    def __init__(self, path: Path, budget: float, dry: bool, once: bool = False) -> None:
        self.path, self.budget, self.dry, self.once = path, budget, dry, once
        self.start, self.cases = time.monotonic(), []
        self.device = "cpu" if dry else "cuda"
        self.dtype = torch.float16 if dry else torch.bfloat16

    def case(self, name: str, fn: Callable[[], dict[str, Any]]) -> None:
        """Run fn and record what it returns, or how it failed."""
        began = time.monotonic()
        line: dict[str, Any] = {"case": name}
        if began - self.start > self.budget:
            line["error"] = "not run: out of time"
        else:
            try:
                line.update(fn())
            except Exception as error:
                traceback.print_exc(limit=3)
                line["error"] = f"{type(error).__name__}: {str(error)[:600]}"
            if not self.dry:
                torch.cuda.empty_cache()
        line["seconds"] = round(time.monotonic() - began, 2)
        self.add(line)
        if not self.once:
            print(json.dumps(line), flush=True)

    def add(self, line: dict[str, Any]) -> None:
        """Record a case and write the file."""
        self.cases.append(line)
        record = {"environment": environment(), "command": shlex.join(sys.argv)}
        self.path.write_text(json.dumps({**record, "cases": self.cases}, indent=1))

    def ms(self, fn: Callable[[], Any], rep: int = 150) -> float:
        """Median milliseconds, over `rep` of them."""
        if self.dry or self.once:
            began = time.perf_counter()
            fn()
            return 1e3 * (time.perf_counter() - began)
        return triton.testing.do_bench(fn, warmup=rep // 5, rep=rep, return_mode="median")

    def in_turns(self, fns: dict[str, Callable[[], Any]], rounds: int = 3) -> dict[str, float]:
        """Median milliseconds of each, timed in turns: what the clock does meets all alike."""
        found = [{name: self.ms(fn, 50) for name, fn in fns.items()} for _ in range(rounds)]
        return {name: median(turn[name] for turn in found) for name in fns}

    def graph_ms(self, fn: Callable[[], Any]) -> float:
        """Median milliseconds of a replayed CUDA graph: no time of launches."""
        if self.dry or self.once:
            return self.ms(fn)
        return triton.testing.do_bench_cudagraph(fn, rep=100, return_mode="median")

    def kernels(self, fn: Callable[[], Any]) -> dict[str, float]:
        """Microseconds of each kernel of a call, by the profiler's record of ten."""
        found: dict[str, float] = {}
        for name, us in self._kernels(fn):
            found[name[:60]] = round(found.get(name[:60], 0) + us, 1)
        return found

    def us(self, fn: Callable[[], Any]) -> float:
        """Microseconds of all kernels of a call: no gaps between them."""
        return round(sum(us for _, us in self._kernels(fn)), 1)

    def _kernels(self, fn: Callable[[], Any]) -> list[tuple[str, float]]:
        if self.once:
            fn()
            return []
        fn()
        with profile(activities=[ProfilerActivity.CPU if self.dry else ProfilerActivity.CUDA]) as p:
            for _ in range(1 if self.dry else 10):
                fn()
        found = [e for e in p.key_averages() if e.device_type == DeviceType.CUDA]
        return [(e.key, e.device_time_total / 10) for e in found]

    def peak(self, fn: Callable[[], Any]) -> int:
        """Bytes that one call allocates at its worst moment, its result included."""
        if self.dry:
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before

    def tokens(self, batch: int, heads: int, n: int, d: int) -> Tensor:
        """[B, H, N, D] as diffusers gives it."""
        x = torch.randn(batch, n, heads, d, device=self.device, dtype=self.dtype)
        return x.transpose(1, 2)


def wait_for_go(r: Run, wait: bool) -> None:
    """Begin at once, or say "ready" and wait for a line that tells how many seconds there are."""
    if not r.dry:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    if wait:
        print("ready", flush=True)
        r.budget = float(sys.stdin.readline() or 0)
    r.start = time.monotonic()


def environment() -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (interpreter)"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}


def random_table(
    r: Run, q: Tensor, n_k: int, block_q: int, block_k: int, keep: float
) -> BlockTable:
    """The same number of random blocks in every row."""
    rows, columns = block_count(q.shape[2], block_q), block_count(n_k, block_k)
    scores = torch.rand(*q.shape[:2], rows, columns, device=r.device)
    kept = scores.topk(max(1, round(keep * columns))).indices.sort(-1).values.int()
    counts = torch.full(kept.shape[:3], kept.shape[3], dtype=torch.int32, device=r.device)
    return BlockTable(kept, counts, block_q, block_k, q.shape[2], n_k)


def shared(
    script: str, options: argparse.Namespace, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """All cases of a script once, shared by processes, which also compiles; their results."""
    paths = [options.out.with_suffix(f".{i}.part") for i in range(options.workers)]
    command = [sys.executable, script, *(["--dry-run"] if options.dry_run else [])]
    for name in ("part", "match"):
        command += [f"--{name}", getattr(options, name)] if getattr(options, name, None) else []
    command += ["--single"] if getattr(options, "single", False) else []
    children = [
        subprocess.Popen([*command, "--out", str(path), "--shard", f"{i}/{options.workers}"])
        for i, path in enumerate(paths)
    ]
    deadline = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:  # a deadlock on the GPU, perhaps
            child.kill()
    lines = []
    for path in filter(Path.exists, paths):
        lines += json.loads(path.read_text())["cases"]
        path.unlink()
    return lines
