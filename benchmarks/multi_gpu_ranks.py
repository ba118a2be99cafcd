"""What each process of multi_gpu.py does: models on its own GPU, then on all GPUs, by Ulysses or
with keys that are gathered or go round.

A row is one model under one method, measured three times: on one GPU; there again with the output
of every linear layer moved by up to half a unit in its last place, which tells what rounding alone
does to this model's output; and on all GPUs. The last must differ from the first by at most MARGIN
times what rounding does. What one GPU gives comes first, for all rows of a model: each process
takes the next row that none has begun, and leaves what it found in a file, for all processes and
for those that are started anew.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from multi_gpu_cases import Case, cases, course_of
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dit_accel.api import accelerated
from dit_accel.bench.models import build, inputs
from dit_accel.bench.rows import switched_on
from dit_accel.parallel import plans
from dit_accel.parallel.sharing import share

MARK = "ROW "
MARGIN = 2.0


@dataclass(frozen=True)
class Place:
    """This process among all."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, dry: bool) -> Place:
        rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cpu") if dry else torch.device("cuda", rank)
        if not dry:
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if dry else "nccl", timeout=timedelta(minutes=10))
        return cls(rank, dist.get_world_size(), device)

    def all(self, value: Any) -> list[Any]:
        """What every process says."""
        said = [None] * self.world
        dist.all_gather_object(said, value)
        return said

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def say(self, row: dict[str, Any]) -> None:
        if self.rank == 0:
            print(MARK + json.dumps(row), flush=True)

    def clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass
class Run:
    """One generation: seconds of each step, and the model's output in the last of the first cycle.

    A cycle has one step of each kind of its row. communicating, computing: shares of the last
    cycle; what they leave of 1, the GPU has waited for the host.
    """

    kinds: tuple[str, ...]
    seconds: list[float] = field(default_factory=list)
    output: Tensor | None = None
    kept: float | None = None
    unplanned: dict[str, int] = field(default_factory=dict)
    implementations: list[str] = field(default_factory=list)
    communicating: float | None = None
    computing: float | None = None
    peak: int = 0

    def facts(self, rounds: int, scale: float) -> dict[str, Any]:
        """JSON-able, seconds of a whole step: the first cycle compiles, and is thrown away."""
        timed = self.seconds[len(self.kinds) : len(self.kinds) * (rounds + 1)]
        by = {kind: timed[n :: len(self.kinds)] for n, kind in enumerate(self.kinds)}
        return {
            "seconds": {k: round(scale * statistics.median(of), 5) for k, of in by.items() if of},
            "spread": {k: round(scale * (max(of) - min(of)), 5) for k, of in by.items() if of},
            "kept": None if self.kept is None else round(self.kept, 4),
            "unplanned": self.unplanned,
            "implementations": self.implementations,
            "communicating": self.communicating,
            "computing": self.computing,
            "peak_gib": round(self.peak / 2**30, 2),
        }


def generate(
    place: Place,
    pipe: Any,
    call: dict[str, Any],
    name: str,
    cycles: int,
    of: int,
    dense: bool = False,
) -> Run:
    """The first `cycles` of `of` cycles of steps; the last of them under the profiler, for the
    shares. dense: a stock pipeline runs through `accelerate`, too, where keys travel by it."""
    row, course = course_of(name, of)
    run, watch = Run(row.kinds() or ("dense",)), cycles == of
    stride, shown, last = len(run.kinds), [], time.perf_counter()
    activity = ProfilerActivity.CUDA if place.device.type == "cuda" else ProfilerActivity.CPU
    profiler = profile(activities=[activity])

    def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal last
        place.wait()
        run.seconds.append(time.perf_counter() - last)
        if step + 1 == stride:
            run.output = shown[-1].float().cpu()
        shown.clear()
        pipe._interrupt = step + 1 == stride * cycles  # diffusers then passes over the rest
        if watch and step + 1 == stride * (of - 1):
            profiler.start()
        last = time.perf_counter()
        return {}

    hook = pipe.transformer.register_forward_hook(lambda module, args, out: shown.append(out[0]))
    call["generator"].manual_seed(0)
    through = accelerated(pipe, "dense") if dense and row.method is None else nullcontext()
    try:
        with through, switched_on(pipe, course, 0, "inductor") as handle:
            last = time.perf_counter()
            out = pipe(**call, num_inference_steps=stride * of, callback_on_step_end=after)
            if handle is not None:
                report = handle.report()
                run.kept, run.implementations = report.kept, sorted(report.implementations)
                run.unplanned = report.unplanned
    finally:
        hook.remove()
    if not out[0].isfinite().all():
        raise RuntimeError("the latents are not finite")
    if watch:
        profiler.stop()
        run.communicating, run.computing = _shares(profiler, sum(run.seconds[-stride:]))
    if place.device.type == "cuda":
        run.peak = torch.cuda.max_memory_allocated(place.device)
    return run


def _shares(profiler: profile, seconds: float) -> tuple[float | None, float | None]:
    """Shares of `seconds` in NCCL's kernels, in which a GPU also waits for the slower one, or in
    gloo's calls, and in the GPU's other kernels. None where the profiler saw none."""
    events = profiler.events()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and e.name[:5] != "nccl:"]
    nccl = [e for e in kernels if e.name[:4] == "nccl"]
    others = [e for e in kernels if e.name[:4] != "nccl"]
    spent = (nccl or [e for e in events if "gloo:" in e.name], others)
    totals = [sum(e.time_range.elapsed_us() for e in of) / 1e6 for of in spent]
    return tuple(round(total / seconds, 4) if total else None for total in totals)


@contextmanager
def rounded_anew(transformer: nn.Module) -> Iterator[None]:
    """Every linear layer's output moves by up to half a unit in its last place, at random."""

    def move(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        half = torch.finfo(out.dtype).eps / 2
        return torch.addcmul(out, out, torch.empty_like(out).uniform_(-half, half))

    linear = [m for m in transformer.modules() if isinstance(m, nn.Linear)]
    hooks = [module.register_forward_hook(move) for module in linear]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def attempt(place: Place, *args: Any) -> Run | str:
    """A generation, or why it failed on this GPU."""
    try:
        return generate(place, *args)
    except Exception as error:  # the other processes go on, and so does this one
        traceback.print_exc(file=sys.stdout)
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    finally:
        place.clean()


def slowest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of the process with the slowest steps, with what all of them kept."""
    kept = [facts["kept"] for facts in runs if facts["kept"] is not None]
    found = max(runs, key=lambda facts: sum(facts["seconds"].values()))
    return {**found, "kept": round(statistics.mean(kept), 4) if kept else None}


def split(case: Case, pipe: Any, world: int, dry: bool) -> nn.Module:
    """A second transformer with the first one's weights that shares its tokens with all GPUs."""
    alone = pipe.transformer
    twin = copy.deepcopy(alone, {id(weight): weight for weight in alone.parameters()})
    size = case.model.tiny["size"] if dry else case.model.size
    text = case.model.tiny["text"] if dry else case.model.text
    text = text // 4 if case.model.masks else text  # that much of it is valid, see bench.models
    frames = (size[2] + 3) // 4 if len(size) == 3 else 1
    tokens = size[0] // 16 * (size[1] // 16) * frames
    heads = alone.config.num_attention_heads
    pipe.transformer = twin
    heads = heads if case.kv is None else 0
    share(pipe, kv=case.kv, anything=any(n % world for n in (heads, tokens, text)))
    pipe.transformer = alone
    return twin


@dataclass(frozen=True)
class References:
    """What one GPU gives of each row, in a file each: facts, the output, and what rounding does to
    it; or why it failed."""

    folder: Path

    def begin(self) -> None:
        """Forget what processes before these have begun, and what failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for claim in self.folder.glob("*.claim"):
            claim.unlink()
        for path in self.folder.glob("*.pt"):
            if "failed" in torch.load(path):
                path.unlink()

    def path(self, case: Case, row: str) -> Path:
        name = f"{case.model.name} {case.dtype} {row}"
        return self.folder / (
            "".join(c if c.isalnum() or c in ".@+" else "-" for c in name) + ".pt"
        )

    def claim(self, case: Case, row: str) -> bool:
        """Whether this process is the one that makes it."""
        path = self.path(case, row)
        try:
            path.with_suffix(".claim").touch(exist_ok=False)
        except FileExistsError:
            return False
        return not path.exists()

    def write(self, case: Case, row: str, found: dict[str, Any]) -> None:
        path = self.path(case, row)
        torch.save(found, part := path.with_suffix(".part"))
        part.replace(path)

    def read(self, case: Case, row: str) -> dict[str, Any] | None:
        path = self.path(case, row)
        return torch.load(path) if path.exists() else None


def dearest_first(rows: list[str]) -> list[str]:
    """So that no process is left with a long row at the end."""

    def cost(name: str) -> int:
        row, _ = course_of(name, 1)
        return 3 * (row.method is None) + 2 * len(row.kinds()) + ("compile" in row.added)

    return sorted(rows, key=cost, reverse=True)


@dataclass
class Bench:
    """One model on one GPU and on all."""

    place: Place
    case: Case
    rounds: int
    dry: bool
    references: References

    def __post_init__(self) -> None:
        self.pipe = build(self.case.model, self.place.device, self.case.dtype, self.dry)
        self.call = inputs(self.case.model, self.pipe, self.place.device, self.dry)
        self.alone = self.pipe.transformer
        plans.prepare(self.alone)  # one GPU, too, goes without the padding of the prompt
        self.take(self.case)
        self.scale = self.case.model.passes / self.case.model.timed

    def take(self, case: Case) -> None:
        """Share the same model as this case says."""
        self.case = case
        self.twin = split(case, self.pipe, self.place.world, self.dry)

    def refer(self, rows: list[str], until: float) -> None:
        """These rows on one GPU, as many beside each other as there are processes."""
        longest = 0.0
        for name in dearest_first(rows):
            began = time.time()
            if began + longest < until and self.references.claim(self.case, name):
                self.references.write(self.case, name, self._alone(name))
                longest = max(longest, time.time() - began)
        self.place.all(None)  # all are there

    def _alone(self, name: str) -> dict[str, Any]:
        """What one GPU gives of a row, as it is and rounded anew."""
        place, cycles = self.place, self.rounds + 2
        one = attempt(place, self.pipe, self.call, name, cycles - 1, cycles)
        if isinstance(one, str):
            return {"failed": one}
        with rounded_anew(self.alone):
            moved = attempt(place, self.pipe, self.call, name, 1, cycles)
        if isinstance(moved, str):
            return {"failed": moved}
        found = {"facts": one.facts(self.rounds, self.scale), "output": one.output}
        return {**found, "kinds": one.kinds, "rounding": relative(moved.output, one.output)}

    def row(self, name: str) -> None:
        """All GPUs, beside one; what is known of one is said before."""
        place, alone = self.place, self.references.read(self.case, name)
        found: dict[str, Any] = {"case": self.case.name, "row": name, "gpus": place.world}
        if alone is None:
            place.say({**found, "skipped": "no time left"})
            return
        found |= (
            {"alone_error": alone["failed"]} if "failed" in alone else {"alone": alone["facts"]}
        )
        place.say(found)
        self.pipe.transformer = self.twin
        cycles, dense = self.rounds + 2, self.case.kv is not None
        try:
            both = generate(place, self.pipe, self.call, name, cycles, cycles, dense)
        except RuntimeError as error:
            if "cannot run token pruning" not in str(error):
                raise  # perhaps of this process alone: the launcher ends all
            place.say({**found, "refused": str(error)})
            return
        finally:
            self.pipe.transformer = self.alone
            place.clean()
        found["together"] = slowest(place.all(both.facts(self.rounds, self.scale)))
        if "alone" in found:
            found |= self._compare(found, alone, both)
        place.say(found)

    def _compare(self, found: dict[str, Any], alone: dict[str, Any], both: Run) -> dict[str, Any]:
        """Speed-up of each kind of step, and the distance of the outputs; off_stock: what the
        method does to the output, beside which an error can be seen to be small."""
        stock = self.references.read(self.case, "stock")
        if found["row"] != "stock" and stock and "output" in stock and len(alone["kinds"]) == 1:
            found["off_stock"] = relative(
                alone["output"], stock["output"]
            )  # otherwise a later step
        rounding = alone["rounding"]
        error = max(self.place.all(relative(both.output, alone["output"])))
        pairs = {
            k: (s, found["together"]["seconds"][k]) for k, s in found["alone"]["seconds"].items()
        }
        faster = {"speedup": {kind: round(a / b, 3) for kind, (a, b) in pairs.items()}}
        if "pruned" in alone["kinds"]:  # each GPU chooses among its own tokens: another choice
            return faster
        return {
            **faster,
            "error": error,
            "rounding": rounding,
            "bound": MARGIN * rounding,
            "equal": error <= MARGIN * rounding,
        }


def work(spec: dict[str, Any]) -> None:
    """The rows of `spec`: part, todo ([case, row] pairs), rounds, until (Unix time), dry, and
    references, a folder."""
    place, references = Place.join(spec["dry"]), References(Path(spec["references"]))
    if spec["dry"]:
        torch.set_num_threads(1)
    if place.rank == 0:
        references.begin()
    place.all(None)
    longest, bench = 0.0, None
    todo = {(name, row) for name, row in spec["todo"]}
    wanted = [
        (case, [row for row in case.rows if (case.name, row) in todo])
        for case in cases(spec["part"], spec["dry"])
    ]
    for case, rows in wanted:
        if not rows:
            continue
        if bench is not None and same_model(bench.case, case):
            bench.take(case)
        else:
            bench = None  # its memory goes before the next one's comes
            place.clean()
            bench = Bench(place, case, spec["rounds"], spec["dry"], references)
            every = dict.fromkeys(row for c, of in wanted if same_model(c, case) for row in of)
            bench.refer(list(every), spec["until"])
            longest = 0.0
        for row in rows:
            began = time.time()
            if place.all(began + longest > spec["until"])[0]:
                place.say({"case": case.name, "row": row, "skipped": "no time left"})
                continue
            bench.row(row)
            longest = max(longest, time.time() - began)
        place.clean()
    dist.destroy_process_group()


def same_model(one: Case, other: Case) -> bool:
    return (one.model, one.dtype) == (other.model, other.dtype)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
