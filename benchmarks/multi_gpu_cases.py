"""What multi_gpu.py runs: models, rows, and how tokens and keys travel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from dit_accel.bench.models import MODELS, Model
from dit_accel.bench.rows import Course, Row
from dit_accel.config import Options
from dit_accel.methods import Method
from dit_accel.pipelines import registry

SPARSE = ("pooled@0.1", "topk@0.1", "rectified@0.1", "sla@0.1", "shared@0.1", "rettention@0.1",
          "vsa@0.1", "ssta@0.1")  # fmt: skip
PRUNED = tuple(f"{name}+prune" for name in SPARSE[:4])  # those that keep no state
COMPILED = tuple(f"{name}+compile" for name in ("stock", *SPARSE[:3]))
COMPILED += tuple(f"{name}+prune" for name in COMPILED[1:])
VIDEO = ("stock", *SPARSE[:2], PRUNED[0], *SPARSE[2:], *PRUNED[1:], *COMPILED)
BUDGETS = (" budgets", " budgets unlevel")  # a keep for each head
ROUND = ("stock", "topk@0.1", "pooled@0.1", "sla@0.1")  # for which keys go round: others gather
STAY = (*ROUND, "rectified@0.1", "shared@0.1", "rettention@0.1")
# Ulysses (None), and how keys travel where queries stay; what matters least comes last. A budget
# for each head is Ulysses' affair.
WAYS = (
    (None, (*STAY, *(f"topk@0.1{more}" for more in BUDGETS), *COMPILED[:3])),
    ("gather", (*STAY, "topk@0.1+compile", "stock+compile")),
    ("ring", (*ROUND, "topk@0.1+compile")),
    (None, (*(f"pooled@0.1{more}" for more in BUDGETS), *SPARSE[6:])),
)
EQUAL = ("stock", *SPARSE)  # in float32 rounding hides least
FEW = {"num_layers": 2, "num_single_layers": 4}
TEXTS = (0, 3)  # tokens less than the published prompt: numbers that divide, and that do not


@dataclass(frozen=True)
class Case:
    """One model in one precision, the rows that it is run with, and how its keys travel."""

    name: str
    model: Model
    dtype: torch.dtype
    rows: tuple[str, ...]
    kv: str | None = None


def cases(part: str, dry: bool) -> list[Case]:
    """The cases of part "ulysses", "joint" or "ways". dry: everything in float32."""
    half = torch.float32 if dry else torch.bfloat16
    if part == "ways":
        models = [MODELS["wan14b-720p"], MODELS["hunyuan-720p"]]
        for at, model in enumerate(models):  # heads and query blocks enough for four
            small = {**model.tiny["config"], "num_attention_heads": 4}
            tiny = {**model.tiny, "config": small, "size": (128, 128, 17)}
            models[at] = replace(model, tiny=tiny)
        return [
            Case(f"{model.name}, {kv or 'ulysses'}", model, half, rows, kv)
            for model in models
            for kv, rows in WAYS
        ]
    if part == "ulysses":
        small, large = MODELS["wan1.3b-480p"], MODELS["wan14b-720p"]
        few = replace(small, config={**small.config, "num_layers": 4}, size=(480, 832, 17))
        return [
            Case(small.name, small, half, VIDEO),
            Case(f"{small.name}, 4 layers, 17 frames, float32", few, torch.float32, EQUAL),
            Case(large.name, large, half, VIDEO),
        ]
    found, flux = [], MODELS["flux-1024"]
    for dtype in dict.fromkeys((half, torch.float32)):
        for less in TEXTS:
            tiny = {**flux.tiny, "text": flux.tiny["text"] - less}
            few = {"config": {**flux.config, **FEW}, "text": flux.text - less, "tiny": tiny}
            name = f"{flux.name}, {flux.text - less} text tokens, {str(dtype)[6:]}"
            found.append(Case(name, replace(flux, **few), dtype, EQUAL))
    return found


@dataclass(frozen=True)
class Budgeted(Course):
    """A keep for each head of every layer, the row's on the mean: 0.5 and 1.5 times it in turn, so
    that all processes have as much to do as they come, or, not level, in halves, which Ulysses
    deals out."""

    level: bool = True

    def options(self, transformer: nn.Module, min_tokens: int | None) -> tuple[Method, Options]:
        method, options = super().options(transformer, min_tokens)
        heads = transformer.config.num_attention_heads
        low, high = 0.5 * method.keep, 1.5 * method.keep
        keeps = [high if i % 2 else low for i in range(heads)]
        layers = len(registry.find(transformer).attentions(transformer))
        each = tuple((i, tuple(keeps if self.level else sorted(keeps))) for i in range(layers))
        return method, {**options, "schedule": replace(options["schedule"], head_keep=each)}


def course_of(name: str, rounds: int) -> tuple[Row, Course]:
    """A row by its name, and its course: budgets are known here alone."""
    plain, _, budgets = name.partition(BUDGETS[0])
    row = Row.parse(plain)
    if plain == name:
        return row, Course(row, rounds, dense=False)
    return row, Budgeted(row, rounds, dense=False, level=not budgets)
