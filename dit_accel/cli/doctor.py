"""`dit-accel doctor`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from dit_accel.cli.options import checked, option
from dit_accel.generation import options as say
from dit_accel.generation.options import How, What, Where, parse_size

if TYPE_CHECKING:
    from dit_accel.cli.progress import Progress
    from dit_accel.doctor.diagnosis import Diagnosis
    from dit_accel.doctor.sample import Sample


_WHAT = "What to examine"
PROMPT = "rocket on a blue background"
STEPS = 50  # of a model that is known by its configuration only

ConfigOnly = Annotated[
    bool, option("Random weights from the configuration.", _WHAT, "--config-only")
]
Json = Annotated[bool, option("JSON on stdout.", _WHAT, "--json")]


def doctor(
    where: Where,
    config_only: ConfigOnly = False,
    size: say.Size = None,
    frames: say.Frames = None,
    steps: say.Steps = None,
    order: say.Order = "raster",
    as_json: Json = False,
) -> None:
    """Say what acceleration can give a model on this machine, by timing one layer of it.

    dit-accel doctor

    dit-accel doctor --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 81

    dit-accel doctor --model wan/transformer/config.json --config-only --device cuda
    """
    from dit_accel.cli.progress import Progress
    from dit_accel.doctor.run import examine

    what, how = What(PROMPT, steps=steps, size=size, frames=frames), How(order=order)
    with Progress() as progress, checked():
        sample, run = _sample(what, how, where, config_only, progress)
        found = examine(sample, **run, order=order or "raster", progress=progress)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found)


def _sample(
    what: What, how: How, where: Where, config_only: bool, progress: Progress
) -> tuple[Sample, dict[str, Any]]:
    """What to examine, and the steps of a run and the schedule of a checkpoint, if any."""
    import torch

    from dit_accel.cli.session import load
    from dit_accel.doctor import sample
    from dit_accel.doctor.from_config import family_of, read_config
    from dit_accel.generation.loading import find_model, pick_device, pick_dtype
    from dit_accel.generation.request import arguments

    request = what.request()
    if config_only and where.checkpoint:
        raise ValueError("--config-only takes random weights: leave --checkpoint out")
    if config_only:
        config = read_config(where.model or find_model(None))
        device = pick_device(where.device)
        kind = getattr(torch, pick_dtype(where.dtype, device))
        usual = family_of(config["_class_name"]).size
        width, height = parse_size(what.size) if what.size is not None else usual[:0:-1]
        asked = (what.frames or usual[0], height, width)
        progress("building a layer", 0, None)
        return sample.from_config(config, asked, device, kind), {"steps": what.steps or STEPS}
    pipe, defaults, _, trained = load(where, request, how, progress)
    progress("reading the model", 0, None)
    count = arguments(pipe, defaults, request).get("num_inference_steps")
    run: dict[str, Any] = {"steps": count or STEPS}
    if trained is not None and trained.config is not None:
        run["schedule"] = trained.config.schedule
    return sample.from_pipeline(pipe, defaults, request), run


def _print(found: Diagnosis) -> None:
    from rich.table import Table
    from rich.text import Text

    from dit_accel.cli.screen import screen

    out = screen()
    out.print(Text.assemble((str(found.model), "bold"), f" on {found.device}, {found.dtype}"))
    grid = " × ".join(map(str, found.grid))
    if found.measured_tokens != found.tokens:
        grid = f"timed on {found.measured_tokens}"
    shape = f"{found.layers} layers, {found.heads} heads of {found.head_dim}"
    out.print(f"{found.tokens} visual tokens ({grid}), {shape}")
    out.print(
        f"one forward {found.forward_seconds:.3g} s, of it attention {found.attention_share:.0%}: "
        f"at most {found.bound:.2f}× if attention took no time"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("method", "keep", "at most", "predicted"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for o in found.outlook:
        predicted = f"{o.predicted:.2f}×" if o.predicted else o.why
        table.add_row(o.method, f"{o.keep:g}", f"{o.ceiling:.2f}×", predicted)
    out.print(table, soft_wrap=False)
    for name, size in found.state_bytes.items():
        out.print(f"state of {name}: {size / 2**20:.1f} MiB")
    if found.free_bytes is not None:
        out.print(f"free memory: {found.free_bytes / 2**30:.1f} GiB")
    if found.crossover is not None:
        out.print(f"below {found.crossover} tokens attention stays dense unless --min-tokens")
    for line in (*(f"dense: {why}" for why in found.obstacles), *found.notes):
        out.print(line)
    out.print(f"\n{found.recommendation}", style="bold")
