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
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from multi_gpu_cases import Case, cases
from multi_gpu_references import References, dearest_first
from multi_gpu_run import Place, Run, attempt, generate, relative, rounded_anew, slowest
from torch import nn

from dit_accel.bench.models import build, inputs
from dit_accel.parallel import plans
from dit_accel.parallel.sharing import share

MARGIN = 2.0


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
