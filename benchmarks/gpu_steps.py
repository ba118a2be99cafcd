r"""Seconds of the steps of whole models: of each kind, compiled kernel by kernel, blocks offloaded.

    python benchmarks/gpu_steps.py --model wan14b-720p --parts kinds offload --out steps.json
    python benchmarks/gpu_steps.py --out /tmp/x.json --tiny    on a CPU, in seconds

Random weights in the stock pipeline, as in `dit-accel bench --e2e`. Parts:
profile   a compiled step of --rows, as gpu_profile.py has it: attention, products, the rest
kinds     a step of each kind that a profile makes (dense, full, sparse, skipped), of `balanced`
          (`fast` differs from it in how many are skipped) and, for small models, `conservative`,
          or of those that --speeds names.
          Whether the step cache skips is said here: it depends on weights.
compiled  `balanced` with compiled blocks
offload   a step of --offload-row without offload, and with blocks:1 and 2: seconds, seconds that
          were waited for weights, and the peak of memory. The first one of each does not count.

Each case is written as it ends. --wait is for gpu_all.py: all is built and compiled, then the turn
is waited for.
"""

from __future__ import annotations

import argparse
import gc
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_profile import profiled, summary, under
from gpu_run import Run, wait_for_go
from profiles import kinds

from dit_accel import accelerated
from dit_accel.bench.models import MODELS, build, inputs
from dit_accel.bench.rows import Row, set_skip
from dit_accel.generation.arrival import waits_of
from dit_accel.generation.offload import Offload
from dit_accel.generation.options import How
from dit_accel.generation.speeds import NAMES
from dit_accel.pipelines.denoisers import call as call_pipeline
from dit_accel.schedule import Schedule

STEPS = 20  # of the run that a few steps are taken from, as the profiles were found
EVERY = 5  # a quarter of them: the period of the profiles' full steps
LARGE = ("wan14b-720p", "hunyuan-720p")  # a step of each kind once


class Model:
    """A pipeline of random weights, and the steps that are run with it."""

    def __init__(self, name: str, tiny: bool, layers: int | None = None) -> None:
        self.model, self.tiny = MODELS[name], tiny
        if layers is not None:
            config = {**self.model.config, "num_layers": layers}
            self.model = replace(self.model, config=config)
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.compiler = "eager" if tiny else "inductor"
        self.pipe = build(self.model, self.device, self.dtype, tiny)
        self.call = inputs(self.model, self.pipe, self.device, tiny)

    @property
    def scale(self) -> float:
        """Transformer forwards of a step over those that run here."""
        return self.model.passes / self.model.timed

    @property
    def least(self) -> int | None:
        return 0 if self.tiny else None

    def steps(
        self, count: int, skipped: tuple[int, ...] = (), short: bool = False
    ) -> list[dict[str, float]]:
        """Seconds of the first `count` of STEPS steps, and those in which weights were waited for.

        short: of a clip of few frames, which compiles the same kernels.
        """
        found: list[dict[str, float]] = []
        transformer = self.pipe.transformer
        waits = waits_of(transformer)
        last = [0.0, 0.0]

        def now() -> list[float]:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return [time.perf_counter(), 0.0 if waits is None else waits.seconds]

        def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal last
            seconds, waited = (a - b for a, b in zip(now(), last, strict=True))
            found.append({"seconds": seconds} | ({} if waits is None else {"waited": waited}))
            set_skip(transformer, step + 1 in skipped)
            pipe._interrupt = step + 1 >= count  # diffusers then passes over what is left
            last = now()
            return {}

        call = dict(self.call)
        if short and "num_frames" in call:
            call["num_frames"] = 9 if self.tiny or call["height"] > 500 else 33
        set_skip(transformer, 0 in skipped)
        last = now()
        call_pipeline(
            self.pipe, **call, num_inference_steps=STEPS, callback_on_step_end=after,
            return_dict=False,
        )  # fmt: skip
        return found[:count]

    def kinds(
        self, speed: str, compiled: bool, rounds: int, dense: bool = True, short: bool = False
    ) -> dict[str, Any]:
        """Steps of a profile: `rounds` dense ones, and as often full, sparse and skipped ones."""
        how = How(speed=speed, compile=compiled, min_tokens=self.least).at_speed()
        first = rounds if dense else 0
        config = replace(how.config(), schedule=Schedule(warmup=first))
        sparse = min(2, rounds)  # in a row
        count = first + EVERY * (rounds - 1) + sparse + 2
        skipped = tuple(range(first + sparse + 1, count, EVERY))
        self.forget()
        with how.boost().switch_on(self.pipe), accelerated(self.pipe, config) as handle:
            seconds = [x["seconds"] * self.scale for x in self.steps(count, skipped, short)]
            report = handle.report()
        every: dict[str, list[float]] = {}
        for kind, s in zip(kinds(report)[:count], seconds, strict=True):
            every.setdefault(kind, []).append(round(s, 4))
        later = {kind: median(of[1:] or of) for kind, of in every.items()}
        return {"speed": speed, "method": report.method, "step_seconds": later, "every": every,
                "compiled": compiled, "state_gib": round(report.state_bytes / 2**30, 2),
                "implementations": sorted(report.implementations), **self.peak()}  # fmt: skip

    def offloaded(self, row: str, blocks: int | None) -> dict[str, Any]:
        """The second of two steps of a row; blocks: in the window, None: no window."""
        recipe = Row.parse(row)
        self.forget()
        options = {"schedule": Schedule(warmup=0), "min_tokens": self.least}
        with accelerated(self.pipe, recipe.method, **options):
            first, last = self.steps(2)
        here = sum(p.nbytes for p in self.pipe.transformer.parameters())
        return {"row": row, "blocks": blocks, "step_seconds": last["seconds"],
                "waiting": last.get("waited", 0.0) / last["seconds"], "first": first,
                "weights_gib": round(here / 2**30, 2), **self.peak()}  # fmt: skip

    def forget(self) -> None:
        """Give back what is free, and measure the peak anew."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """GiB that PyTorch allocated and reserved at most."""
        if self.device.type != "cuda":
            return {}
        return {
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }

    def renewed(self, blocks: int) -> Any:
        """A transformer of the same weights whose blocks come and go."""
        from accelerate import init_empty_weights

        old = self.pipe.transformer
        with init_empty_weights(include_buffers=False):
            new = type(old).from_config(old.config)
        new.load_state_dict(old.state_dict(), assign=True)
        new.requires_grad_(False).eval()
        pipe = type(self.pipe)(**{**self.pipe.components, "transformer": new})
        Offload(blocks).switch_on(pipe, self.device)
        return new


def run(r: Run, m: Model, options: argparse.Namespace) -> None:
    """All parts; what is compiled or moved ahead comes before the turn."""
    parts, rows = options.parts, options.rows
    windows: list[Any] = []
    rounds = 1 if m.model.name in LARGE else 2
    speeds = options.speeds or ("balanced", "conservative")[:rounds]
    if {"kinds", "compiled"} & set(parts):
        r.case("ahead: all kinds", lambda: m.kinds(speeds[0], False, 1, short=True))
    if "compiled" in parts:
        r.case("ahead: all kinds, compiled", lambda: m.kinds("balanced", True, 1))
    if "offload" in parts:
        r.case("ahead: blocks to the host", lambda: windows.append(m.renewed(1)) or {})
    with ExitStack() as stack:
        if "profile" in parts:
            stack.enter_context(under(m.pipe, rows[0], m.device, m.compiler))
            r.case(f"ahead: {rows[0]}", lambda: {"steps": m.steps(1)})
        wait_for_go(r, options.wait)
        if "profile" in parts:
            r.case(f"profile {rows[0]}", lambda: kernels(m, rows[0]))
    if "kinds" in parts:
        for speed in speeds:
            dense = speed == "balanced"  # that of all
            r.case(f"kinds {speed}", lambda s=speed, d=dense: m.kinds(s, False, rounds, d))
    if "compiled" in parts:
        r.case("kinds balanced, compiled", lambda: m.kinds("balanced", True, rounds))
    for row in rows[1:] if "profile" in parts else []:
        with under(m.pipe, row, m.device, m.compiler):
            r.case(f"ahead: {row}", lambda: {"steps": m.steps(1)})
            r.case(f"profile {row}", lambda row=row: kernels(m, row))
    if windows:
        offload(r, m, windows.pop(), options.offload_row)


def kernels(m: Model, row: str) -> dict[str, Any]:
    return {"row": row, **summary(profiled(m.pipe, m.call, m.device, 2))}


def offload(r: Run, m: Model, window: Any, row: str) -> None:
    """The row without offload, then with fewer and more blocks on the GPU."""
    r.case("offload none", lambda: m.offloaded(row, None))
    for blocks in (1, 2):
        if blocks > 1:
            window = m.renewed(blocks)
        m.pipe.register_modules(transformer=window)
        r.case(f"offload blocks:{blocks}", lambda n=blocks: m.offloaded(row, n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="wan1.3b-480p")
    parser.add_argument("--parts", nargs="+", default=["kinds"])
    parser.add_argument("--speeds", nargs="+", choices=NAMES, help="of the kinds")
    parser.add_argument("--rows", nargs="+", default=["topk@0.05+compile"])
    parser.add_argument("--offload-row", default="topk@0.1")
    parser.add_argument("--layers", type=int, help="so many alone, for shares of a profile")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=300, help="seconds after the go")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    options = parser.parse_args()
    torch.manual_seed(0)
    r = Run(options.out, options.budget, options.tiny)
    with torch.no_grad():
        run(r, Model(options.model, options.tiny, options.layers), options)
    print("done", flush=True)


if __name__ == "__main__":
    main()
