"""What a clip was made from: the facts its file carries, and what they say to a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import dit_accel
from dit_accel.config import AccelConfig
from dit_accel.generation.boost import STOCK, Boost
from dit_accel.generation.loading import EMBEDDED, EMBEDDED_NAME, placement
from dit_accel.generation.recipe import recipe
from dit_accel.generation.trained import Trained
from dit_accel.inputs.fields import build, expect
from dit_accel.media.metadata import KEY
from dit_accel.methods.dense import Dense

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def facts_of(
    pipe: DiffusionPipeline,
    values: Mapping[str, object],
    seed: int,
    config: AccelConfig | None,
    *,
    model: str,
    fps: float,
    boost: Boost = STOCK,
    sampler: str | None = None,
    command: str = "",
    trained: Trained | None = None,
) -> dict[str, object]:
    """JSON-able facts of a clip that `pipe(**values)` makes from a seed.

    config: what accelerates it; None is the stock pipeline. command: the line that was typed.
    trained: the checkpoint in the pipeline.
    """
    plain = {k: _plain(v) for k, v in values.items() if k not in ("prompt", "generator")}
    return {
        KEY: dit_accel.__version__,
        "prompt": values["prompt"],
        "negative_prompt": values.get("negative_prompt"),
        "seed": seed,
        "model": EMBEDDED_NAME if model == str(EMBEDDED) else model,
        "pipeline": type(pipe).__name__,
        **placement(pipe),
        "method": "dense" if config is None else config.method.name,
        "config": None if config is None else config.to_dict(),
        "boost": None if boost == STOCK else asdict(boost),
        "sampler": sampler,
        "checkpoint": None if trained is None else trained.to_dict(),
        "arguments": plain,
        "fps": fps,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "command": command,
    }


def _plain(value: object) -> object:
    """A picture by its path."""
    return {"file": value.filename} if hasattr(value, "filename") else value


def lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) as text, for a person."""
    yield "prompt", str(facts.get("prompt"))
    if facts.get("negative_prompt"):
        yield "negative", str(facts["negative_prompt"])
    yield "seed", str(facts.get("seed"))
    where = ", ".join(str(facts.get(key)) for key in ("pipeline", "dtype", "device"))
    yield "model", f"{facts.get('model')} ({where})"
    if facts.get("checkpoint"):
        yield "checkpoint", str(Trained.from_dict(facts["checkpoint"]))
    yield "method", _method(facts)
    if facts.get("sampler"):
        yield "sampler", str(facts["sampler"])
    arguments = facts.get("arguments") or {}
    skipped = ("negative_prompt",)
    yield "settings", ", ".join(f"{k} {v}" for k, v in arguments.items() if k not in skipped)
    others = ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items())
    yield "made with", f"dit-accel {facts.get(KEY)}, {others}"
    if facts.get("command"):
        yield "command", str(facts["command"])


def _method(facts: Mapping[str, object]) -> str:
    config = facts.get("config")
    if not isinstance(config, Mapping):
        return str(facts.get("method"))
    keep = (config.get("method") or {}).get("keep")
    extra = [f"{key} {config[key]}" for key in ("order", "min_tokens") if config.get(key)]
    pruned = ["token pruning"] if config.get("prune") else []
    return ", ".join([f"{facts.get('method')}", f"keep {keep}", *extra, *pruned])


def python(facts: Mapping[str, Any]) -> str:
    """The Python lines that make the clip again; ValueError for facts that make none."""
    for key in ("model", "pipeline", "dtype", "device", "prompt"):
        expect(key, facts.get(key), str)
    expect("seed", facts.get("seed"), int)
    expect("arguments", facts.get("arguments"), dict)
    config = facts.get("config")
    known = AccelConfig(Dense()) if config is None else AccelConfig.from_dict(config)
    boost = facts.get("boost")
    return recipe(
        known,
        {key: facts[key] for key in ("model", "pipeline", "dtype", "device")},
        {"prompt": facts["prompt"], **facts["arguments"]},
        facts["seed"],
        STOCK if boost is None else build(Boost, boost, "boost"),
        facts.get("sampler"),
        Trained.from_dict(facts.get("checkpoint")),
    )
