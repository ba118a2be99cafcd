"""Where a step's time goes on a GPU: attention, matrix products and the rest, kernel by kernel.

    python benchmarks/gpu_profile.py --out profile.json            two minutes on an H100
    python benchmarks/gpu_profile.py --out /tmp/x.json --tiny      a small model, anywhere

A whole model with random weights in its stock pipeline, as in `dit-accel bench --e2e`, runs three
steps of one kind; the last is profiled. Milliseconds are sums over kernels: gaps do not count.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_run import environment
from torch.profiler import ProfilerActivity, profile

from dit_accel import Schedule, accelerated
from dit_accel.bench.models import MODELS, build, inputs
from dit_accel.bench.rows import Row
from dit_accel.generation.boost import compiled_blocks

ROWS = ("stock", "topk@0.1", "pooled@0.1", "shared@0.1", "stock+compile", "topk@0.1+compile")
KINDS = {
    "ours": r"_fwd_kernel|_hopper_fwd",
    "attention": r"attention|flash|fmha|sdpa|attn",
    "products": r"gemm|nvjet|cutlass|cublas|splitk|addmm|mm$|linear",
}
# What a kernel of the rest does, by the operations that its name lists.
REST = {
    "norm of q and k, RoPE": r"rms_norm|rsqrt|complex",
    "layer norm, scale, shift, gate": r"layer_norm",
    "activation": r"gelu|silu",
    "copies": r"memcpy|memset|copy_kernel|catarray",
}
OTHER = "gates, residuals, others"
STEPS = 3


def kind_of(kernel: str) -> str:
    """The first of KINDS that the kernel's name has; else "rest", as all that inductor fused."""
    if kernel.startswith("triton_"):
        return "rest"
    return next((k for k, names in KINDS.items() if re.search(names, kernel.lower())), "rest")


def class_of(kernel: str) -> str:
    """The first of REST that a kernel's name has; else OTHER."""
    return next((c for c, names in REST.items() if re.search(names, kernel.lower())), OTHER)


def profiled(
    pipe: Any, call: dict[str, Any], device: torch.device, steps: int = STEPS
) -> dict[str, float]:
    """Milliseconds of each kernel in the last of `steps` ≥ 2 steps."""
    on_gpu = device.type == "cuda"
    watch = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])

    def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_gpu:
            torch.cuda.synchronize()
        if step == steps - 2:
            watch.start()
        elif step == steps - 1:
            watch.stop()
        return {}

    pipe(**call, num_inference_steps=steps, callback_on_step_end=after, return_dict=False)
    found: Counter[str] = Counter()
    for event in watch.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[event.key] += spent / 1e3
    return dict(found)


@contextmanager
def under(pipe: Any, name: str, device: torch.device, compiler: str = "inductor") -> Iterator[None]:
    """The pipeline as a row has it, sparse from the first step on."""
    recipe = Row.parse(name)
    least = None if device.type == "cuda" else 0
    with ExitStack() as stack:
        if "compile" in recipe.added:
            stack.enter_context(compiled_blocks(pipe.transformer, compiler))
        if recipe.method is not None:
            options = {"schedule": Schedule(warmup=0), "min_tokens": least}
            stack.enter_context(accelerated(pipe, recipe.method, **options))
        yield


def summary(kernels: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of each kind, of each class of the rest, and of the longest kernels."""
    kinds: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for kernel, ms in kernels.items():
        kinds[kind_of(kernel)] += ms
        if kind_of(kernel) == "rest":
            rest[class_of(kernel)] += ms
    longest = sorted(kernels.items(), key=lambda pair: -pair[1])[:60]
    return {
        "ms": {kind: round(ms, 2) for kind, ms in kinds.most_common()},
        "rest": {kind: round(ms, 2) for kind, ms in rest.most_common()},
        "longest": {kernel[:160]: round(ms, 3) for kernel, ms in longest},
    }


def row(pipe: Any, call: dict[str, Any], name: str, device: torch.device) -> dict[str, Any]:
    """One row: its kinds, what the rest is, and its longest kernels."""
    with under(pipe, name, device):
        return {"row": name, **summary(profiled(pipe, call, device))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="wan1.3b-480p")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = build(MODELS[options.model], device, dtype, options.tiny)
    call = inputs(MODELS[options.model], pipe, device, options.tiny)
    record = {"environment": environment(), "command": shlex.join(sys.argv), "rows": []}
    for name in options.rows:
        record["rows"].append(row(pipe, call, name, device))
        options.out.write_text(json.dumps(record, indent=1))
        print(name, record["rows"][-1]["ms"], flush=True)


if __name__ == "__main__":
    main()
