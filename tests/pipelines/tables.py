"""What the documentation says of each model, observed by running it; writes docs/models.md.

python tests/pipelines/tables.py
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import defaultdict
from functools import cache
from pathlib import Path

import diffusers
import torch
from zoo import Case, Pipe, forward, zoo

import dit_accel
from dit_accel import Schedule, TopK
from dit_accel.pipelines import registry

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- written by tests/pipelines/tables.py -->", "<!-- end -->"
REFUSED = registry.left_alone()
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


def row(case: Case) -> tuple[str, ...]:
    """Model, class, sparse attention, token order, regional compile, mask, pipelines, notes."""
    model = case.build()
    with dit_accel.accelerated(Pipe(model), TopK(keep=0.3), order="hilbert", **NOW) as handle:
        forward(model, case.arguments())
        report, engine = handle.report(), handle._engine
        if engine.index is None:
            order = "raster: its tokens form no grid"
        else:
            order = "through the model" if engine.carried else "at each call"
    sparse = "yes" if not report.fallbacks else "; ".join(report.fallbacks)
    if not repeats(case.name):
        compiled = "no: diffusers names no repeated block"
    else:
        n = graphs(case.name, True)
        compiled = f"{n} graph" + "s" * (n > 1)
    pipelines = str(len(known_pipelines()[case.name]))
    return (case.family, f"`{case.name}`", sparse, order, compiled, case.mask, pipelines, case.note)


HEAD = ("model", "class", "sparse", "token order", "regional compile", "mask", "pipelines", "notes")


def render() -> str:
    """The generated part of docs/models.md."""
    cases = zoo()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row(case) for case in cases.values()]
    served = known_pipelines()
    lines = [START, ""]
    lines += [f"{len(cases)} transformer classes, {sum(map(len, served.values()))} pipelines.", ""]
    lines += [_line(HEAD), _line(["---"] * len(HEAD)), *map(_line, rows), ""]
    lines += ["Left as they are:", ""]
    lines += [f"- `{name}`: {why}." for name, why in sorted(REFUSED.items())]
    lines += ["", "Pipelines, by transformer:", ""]
    lines += [f"- `{name}`: {', '.join(names)}" for name, names in served.items() if names]
    return "\n".join([*lines, "", END])


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    text = PAGE.read_text()
    before, after = text.split(START)[0], text.split(END)[-1]
    PAGE.write_text(before + render() + after)


if __name__ == "__main__":
    sys.exit(main())
