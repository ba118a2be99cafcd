"""What is said of each model, observed by running it; writes docs/reference/models.md.

python tests/pipelines/tables.py
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import shared
import torch
from zoo import Case, Pipe, forward, zoo

import dit_accel
from dit_accel import Schedule, TokenPruning, TopK
from dit_accel.config import resolve
from dit_accel.pipelines import registry

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
START, END = "<!-- written by tests/pipelines/tables.py -->", "<!-- end -->"
REFUSED = registry.left_alone()
SMALL = {"ssta": {"tile": (1, 8, 8), "window": (1, 1, 1)}}  # of few tokens several tiles
ONE_LENGTH = "prompts of one length"  # what vsa takes, see the page
NOW = {"schedule": Schedule(warmup=0), "min_tokens": 0}


def repeats(name: str) -> bool:
    """Does diffusers compile this class region by region?"""
    return bool(getattr(diffusers, name)._repeated_blocks)


@cache
def graphs(name: str, accelerated: bool) -> int:
    """Graphs of one forward under regional compile, with no graph break allowed."""
    case, compiled = zoo()[name], []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = case.build()
    if accelerated:
        dit_accel.accelerate(Pipe(model), TopK(keep=0.999), **NOW)
    model.compile_repeated_blocks(fullgraph=True, backend=count)
    with torch.no_grad():
        forward(model, case.arguments())
    torch._dynamo.reset()
    return len(compiled)


def kinds(name: str) -> int:
    """Graphs that a stock model has at least: one for each class of its repeated blocks."""
    model = zoo()[name].build()
    return len({type(m) for m in model.modules() if type(m).__name__ in model._repeated_blocks})


@cache
def known_pipelines() -> dict[str, list[str]]:
    """Transformer class with an adapter → the diffusers pipelines that hold it."""
    found = defaultdict(set)
    exported = set(dir(diffusers))
    for file in Path(diffusers.__file__).parent.glob("pipelines/**/pipeline_*.py"):
        for text in re.split(r"^class ", file.read_text(), flags=re.MULTILINE)[1:]:
            pipeline = re.match(r"\w+", text)[0]
            for name in re.findall(r"^        transformer: (\w+)", text, re.MULTILINE):
                if pipeline in exported:
                    found[name].add(pipeline)
    return {name: sorted(found[name]) for name in registry.known()}


def row(case: Case, ulysses: str) -> tuple[str, ...]:
    """The cells of HEAD: what was observed, and why not where it was not."""
    model = case.build()
    with dit_accel.accelerated(Pipe(model), TopK(keep=0.3), order="hilbert", **NOW) as handle:
        forward(model, case.arguments())
        tokens = handle._engine.order
        if tokens.index is None:
            order = "raster: no grid"
        else:
            order = "through the model" if tokens.carried else "at each call"
    compiled = "no"  # no repeated block
    if repeats(case.name):
        n = graphs(case.name, True)
        compiled = f"{n} graph" + "s" * (n > 1)
    return (
        case.family,
        methods(case, model),
        pruned(case, model),
        order,
        compiled,
        ulysses,
        offloaded(case),
        case.mask,
        case.note,
    )


def served(case: Case, model: torch.nn.Module, name: str, **more) -> str:
    """Whether a run of three steps goes sparse from end to end: yes, or why not."""
    pipe, config = Pipe(model, steps=3), resolve(name)
    method = replace(config.method, keep=0.3, **SMALL.get(name, {}))
    order = "hilbert" if config.order == "raster" else config.order  # a method's own layout
    with dit_accel.accelerated(pipe, method, order=order, **NOW, **more) as handle:
        try:
            out = pipe.steps(case.arguments)
        except ValueError as refused:
            return str(refused)
        reasons = list(handle.report().fallbacks)
    assert all(x.isfinite().all() for x in out)
    return "; ".join(reasons) or "yes"


def methods(case: Case, model: torch.nn.Module) -> str:
    """Which methods run sparse from end to end: all, or all but some, with a reason that is new."""
    found = {name: served(case, model, name) for name in METHODS}
    reasons = {name: "" if ONE_LENGTH in why else f": {why}" for name, why in found.items()}
    others = [f"{name}{reasons[name]}" for name, why in found.items() if why != "yes"]
    return f"all but {'; '.join(others)}" if others else "all"


def offloaded(case: Case) -> str:
    """Whether a sparse run whose blocks come and go one by one gives what it gives without."""
    if not getattr(diffusers, case.name)._supports_group_offloading:
        return "no: not in diffusers"
    outs = []
    for moves in (False, True):
        pipe = Pipe(case.build(), steps=2)
        if moves:
            cpu = torch.device("cpu")
            options = {"offload_type": "block_level", "num_blocks_per_group": 1}
            pipe.transformer.enable_group_offload(onload_device=cpu, **options)
        with dit_accel.accelerated(pipe, TopK(keep=0.3), **NOW) as handle:
            outs.append(pipe.steps(case.arguments))
            assert not handle.report().fallbacks
    return "yes" if all(map(torch.equal, *outs)) else "no: another result"


def pruned(case: Case, model: torch.nn.Module) -> str:
    """The same with half of the tokens pruned."""
    adapter = registry.find(model)
    if adapter.span is None:
        return f"no: {adapter.no_span}"
    half = TokenPruning(keep=0.5, start=1, end=0, first=1, last=None)
    return served(case, model, "topk", prune=half)


METHODS = tuple(name for name in dit_accel.methods() if name != "dense")
HEAD = ("model", "methods", "pruning", "token order", "regional compile", "Ulysses")
HEAD += ("group offload", "mask", "notes")


def observed() -> list[tuple[str, ...]]:
    """The rows of all models."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [row(case, shared.observed().get(name, "no")) for name, case in zoo().items()]


def written() -> dict[str, tuple[str, ...]]:
    """Class → its row in the page; ValueError where the page has not one for each."""
    lines = PAGE.read_text().split(START)[1].split(END)[0].splitlines()
    rows = [tuple(line[2:-2].split(" | ")) for line in lines if line.startswith("| ")]
    return dict(zip(zoo(), rows[2:], strict=True))


def render(rows: Iterable[tuple[str, ...]]) -> str:
    """The generated part of docs/reference/models.md."""
    cases, pipelines = zoo(), known_pipelines()
    lines = [START, ""]
    lines += [
        f"{len(cases)} transformer classes, {sum(map(len, pipelines.values()))} pipelines.",
        "",
    ]
    lines += [_line(HEAD), _line(["---"] * len(HEAD)), *map(_line, rows), ""]
    lines += ["## Left as they are", ""]
    lines += [f"- `{name}`: {why}." for name, why in sorted(REFUSED.items())]
    lines += ["", "## Pipelines", ""]
    lines += [
        f"- {case.family}, `{name}`: {', '.join(pipelines[name]) or 'modular ones only'}"
        for name, case in cases.items()
    ]
    return "\n".join([*lines, "", END])


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    text = PAGE.read_text()
    before, after = text.split(START)[0], text.split(END)[-1]
    PAGE.write_text(before + render(observed()) + after)


if __name__ == "__main__":
    sys.exit(main())
