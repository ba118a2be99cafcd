"""What a timed layer means for a whole run: bounds, predictions, bytes, obstacles, one advice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dit_accel.config import CROSSOVER, named
from dit_accel.doctor.sample import Sample
from dit_accel.machine import free_bytes
from dit_accel.methods import Method, infos
from dit_accel.methods.stateful import Remembering
from dit_accel.pipelines import registry
from dit_accel.pipelines.base import Geometry
from dit_accel.pipelines.denoisers import transformers_of
from dit_accel.pruning import step_cache
from dit_accel.schedule import FEW_STEPS, Schedule

USUAL = Schedule()
WORTH = 1.1  # a smaller gain is within what a busy machine varies by


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one transformer block of a kind.

    kind: its class.
    count: how many of it the model has.
    dense: as it is.
    hollow: without its attention core.
    methods: method → with it.
    """

    kind: str
    count: int
    dense: float
    hollow: float
    methods: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outlook:
    """What one method can give a whole denoising loop.

    method: its name.
    keep: of the method as it comes.
    ceiling: speed-up if its work cost exactly its share of dense attention.
    predicted: speed-up from the measured block, or None when it did not run.
    why: it did not run.
    """

    method: str
    keep: float
    ceiling: float
    predicted: float | None
    why: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that `dit-accel doctor` says.

    model, device, dtype: what was examined.
    grid: (T, H, W) of the visual tokens of the timed block.
    tokens: visual tokens of a forward at the asked size.
    measured_tokens: of the timed block; where fewer than `tokens`, attention was scaled with the
        square and the rest in proportion.
    layers, heads, head_dim: of the model's attention.
    steps: of a run.
    dense_steps: how many of them the schedule makes dense in all layers.
    forward_seconds: of one transformer forward.
    attention_share: of it, spent in attention's core.
    bound: speed-up if attention took no time at all.
    outlook: of each method.
    crossover: tokens below which attention stays dense on this device, or None.
    state_bytes: of a whole run, by what keeps them.
    free_bytes: of the device, or None where it does not tell.
    obstacles: why attention would run dense.
    notes: what else to know.
    recommendation: one piece of advice.
    """

    model: str
    device: str
    dtype: str
    grid: tuple[int, int, int]
    tokens: int
    measured_tokens: int
    layers: int
    heads: int
    head_dim: int
    steps: int
    dense_steps: int
    forward_seconds: float
    attention_share: float
    bound: float
    outlook: list[Outlook]
    crossover: int | None
    state_bytes: dict[str, int]
    free_bytes: int | None
    obstacles: list[str]
    notes: list[str]
    recommendation: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def diagnose(
    sample: Sample,
    layers: list[BlockTimes],
    times: dict[str, dict[str, float] | str],
    seen: tuple[torch.Size, torch.dtype] | None,
    geometry: Geometry,
    reasons: list[str],
    steps: int,
    schedule: Schedule,
) -> Diagnosis:
    """Put together what was found.

    times: method → seconds of each kind of block, or why it did not run. seen: shape of q
    [B, H, N, D] and its dtype, None when every call was dense. reasons: why calls were. schedule:
    of a run of so many steps.
    """
    model: Any = sample.transformer
    forward = sum(layer.count * layer.dense for layer in layers)
    share = 1 - sum(layer.count * layer.hollow for layer in layers) / forward
    outlook = [
        _outlook(name, found, layers, share, steps, schedule) for name, found in times.items()
    ]
    obstacles, notes = _obstacles(sample, geometry, reasons)
    notes += _few(steps, schedule)
    q, dtype = seen or (None, model.dtype)
    tokens = round(geometry.n_visual * sample.scale)
    count = sum(layer.count for layer in layers)
    crossover = CROSSOVER.get(sample.device.type)
    every = count * len(transformers_of(sample.pipe))  # each of two experts has its own
    state = {} if q is None else state_bytes((*q[:2], tokens, q[3]), dtype, every, sample.passes)
    found = Diagnosis(
        model=type(sample.transformer).__name__,
        device=_device_name(sample.device),
        dtype=str(dtype).removeprefix("torch."),
        grid=geometry.grid,
        tokens=tokens,
        measured_tokens=geometry.n_visual,
        layers=count,
        heads=q[1] if q else 0,
        head_dim=q[3] if q else 0,
        steps=steps,
        dense_steps=schedule.dense_steps(steps),
        forward_seconds=forward,
        attention_share=share,
        bound=1 / (1 - share) if share < 1 else float("inf"),
        outlook=outlook,
        crossover=crossover,
        state_bytes=state,
        free_bytes=free_bytes(sample.device),
        obstacles=obstacles,
        notes=notes,
        recommendation="",
    )
    return replace(found, recommendation=recommend(found))


def _few(steps: int, schedule: Schedule) -> list[str]:
    """How many steps are dense where there are few, and what for."""
    if steps > FEW_STEPS:
        return []
    dense = schedule.dense_steps(steps)
    full = {name: dense_steps(named(name), steps, schedule) for name in infos()}
    counts = ", ".join([str(dense), *(f"with {m} {n}" for m, n in full.items() if n > dense)])
    return [
        f"dense of {steps} steps: {counts}; a model that was trained with sparse attention needs "
        "none (--warmup 0), any other comes much closer with one"
    ]


def _outlook(
    name: str,
    found: dict[str, float] | str,
    layers: list[BlockTimes],
    share: float,
    steps: int,
    schedule: Schedule,
) -> Outlook:
    """Ceiling and prediction of a whole run under a schedule."""
    method = named(name)
    dense = dense_steps(method, steps, schedule) / steps
    kept = dense + (1 - dense) * method.keep
    ceiling = 1 / (1 - share + share * kept)
    if isinstance(found, str):
        return Outlook(name, method.keep, ceiling, None, found)
    forward = sum(layer.count * layer.dense for layer in layers)
    sparse = sum(layer.count * layer.methods[name] for layer in layers)
    return Outlook(name, method.keep, ceiling, 1 / (dense + (1 - dense) * sparse / forward))


def dense_steps(method: Method, steps: int, schedule: Schedule = USUAL) -> int:
    """Steps of a run that are dense in a schedule, a state's full steps included."""
    dense = schedule.dense_steps(steps)
    if isinstance(method, Remembering):
        return dense + len(method.full_steps(dense, steps))
    return dense


def state_bytes(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layers: int, passes: int
) -> dict[str, int]:
    """Bytes that a run keeps between steps. shape: of q, (B, H, N, D)."""
    batch, heads, n, d = shape
    keeping = [m for m in map(named, infos()) if isinstance(m, Remembering)]
    out = {
        f"{m.name}, residual={kind!r}": replace(m, residual=kind).state_bytes(shape, dtype)
        for m in keeping
        for kind in ("full", "fp8", "pooled")
    }
    out = {name: each * layers * passes for name, each in out.items()}
    item = torch.finfo(dtype).bits // 8
    # what the span did to each token, and what the probe saw when it last ran
    out["token pruning"] = 2 * batch * n * heads * d * item * passes
    return out


def _obstacles(
    sample: Sample, geometry: Geometry, reasons: list[str]
) -> tuple[list[str], list[str]]:
    """What forces attention to be dense, and what limits the rest."""
    transformer, notes = sample.transformer, []
    adapter = registry.find(transformer)
    if adapter.span is None:
        notes.append("token pruning is not known for this model")
    else:
        blocks = sum(len(found) for found in adapter.span.lists(transformer))
        why = step_cache.obstacle(transformer, 1, blocks - 1, blocks)  # the default span
        notes += [f"token pruning cannot run: {why}"] if why else []
    if geometry.fixed_order:
        notes.append(f"tokens are reordered in each attention call: {geometry.fixed_order}")
    if sample.scale > 1:
        notes.append(
            "timed on fewer tokens; attention is scaled with their square, the rest in proportion"
        )
    return reasons, notes


def recommend(found: Diagnosis) -> str:
    """One piece of advice, in plain words."""
    share = f"attention takes {found.attention_share:.0%} of a layer's time"
    gains = {o.method: o.predicted for o in found.outlook if o.predicted}
    if found.obstacles and not gains:
        return f"Leave it dense: {found.obstacles[0]}."
    many = found.steps > FEW_STEPS
    fewer = "; try fewer steps first: dit-accel evaluate shows what they cost" if many else ""
    if found.bound < WORTH:
        return f"Leave attention dense: {share}, so that no method gains a tenth{fewer}."
    if not gains:
        return f"Leave it dense: no method ran here ({found.outlook[0].why})."
    best = max(gains, key=gains.__getitem__)
    if gains[best] < WORTH:
        return (
            f"Leave attention dense at this size: {share}, and the fastest method ({best}) "
            f"gives {gains[best]:.2f}×{fewer}."
        )
    pick = "pooled" if gains.get("pooled", 0.0) > max(WORTH, 0.9 * gains[best]) else best
    keep = next(o.keep for o in found.outlook if o.method == pick)
    bare = "" if found.dense_steps else " and --warmup 0"
    low = f", with --min-tokens {found.tokens}" if found.tokens < (found.crossover or 0) else ""
    return (
        f"Take {pick} at keep {keep:g}{bare}{low}: {share}, and a whole run should be "
        f"{gains[pick]:.2f}× as fast; let dit-accel tune find the keep that is close enough."
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
