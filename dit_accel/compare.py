"""The same prompt and seed, dense and accelerated: clips, contact sheet, report."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from PIL import Image

from dit_accel import __version__, html, metrics, video
from dit_accel.api import accelerated, restore
from dit_accel.boost import Boost
from dit_accel.config import AccelConfig
from dit_accel.generate import ProgressFn, Request, Result, arguments, generate, warm_up
from dit_accel.loading import EMBEDDED, Defaults

EMBEDDED_NAME = "the embedded model"
STOCK = Boost()


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: `data` is what report.json holds; `files` are the paths written."""

    data: dict[str, Any]
    files: dict[str, Path]


def compare(
    pipe: Any,
    defaults: Defaults,
    request: Request,
    config: AccelConfig,
    out: str | Path,
    *,
    boost: Boost = STOCK,
    model: str = "",
    command: str = "",
    progress: ProgressFn = lambda phase, done, total: None,
) -> Comparison:
    """Generate dense, then accelerated from the same seed, and write what came of it to `out`.

    One dense and one accelerated step run first, untimed, so that neither run pays for set-up.
    boost: compilation is for both, step cache and LoRA are for the accelerated run. The pipeline is
    left stock. Raises ValueError before anything runs when the request does not suit the pipeline
    or `out` cannot be written.
    """
    values = arguments(pipe, defaults, request)
    folder = video.check_folder(out)
    restore(pipe)
    boost.check(pipe)
    with boost.compiled(pipe):
        _warm_up(pipe, defaults, request, config, progress)
        dense = generate(pipe, defaults, request, _named("dense", progress))
        with boost.adapted(pipe), boost.cached(pipe), accelerated(pipe, config) as handle:
            fast = generate(pipe, defaults, request, _named(config.method.name, progress))
            ran = handle.report().to_dict()
    progress("writing", 0, None)
    values = {k: v for k, v in values.items() if k != "generator"}
    model = EMBEDDED_NAME if model == str(EMBEDDED) else model
    where = {"model": model, "pipeline": type(pipe).__name__, **placement(pipe)}
    data = {
        "prompt": request.prompt,
        "seed": request.seed,
        "fps": defaults.fps,
        **where,
        "size": list(dense.frames.shape[:3]),
        "arguments": values,
        "boost": asdict(boost),
        "python": recipe(config, where, values, request.seed, boost),
        "command": command,
        **_findings(dense, fast, ran),
        "machine": machine(pipe),
    }
    return Comparison(data, _write(folder, data, dense, fast))


def _named(name: str, progress: ProgressFn) -> ProgressFn:
    return lambda phase, done, total: progress(f"{name}: {phase}", done, total)


def _warm_up(
    pipe: Any, defaults: Defaults, request: Request, config: AccelConfig, progress: ProgressFn
) -> None:
    progress("warm-up", 0, 2)
    warm_up(pipe, defaults, request)
    progress("warm-up", 1, 2)
    sparse_at_once = replace(config, schedule=replace(config.schedule, warmup=0, cooldown=0))
    steps = 1
    if config.prune is not None:  # its first step runs all tokens
        sparse_at_once = replace(sparse_at_once, prune=replace(config.prune, start=0, end=0))
        steps = 2
    with accelerated(pipe, sparse_at_once):
        warm_up(pipe, defaults, request, steps)
    progress("warm-up", 2, 2)


def _findings(dense: Result, fast: Result, ran: dict[str, Any]) -> dict[str, Any]:
    near = metrics.quality(dense.frames, fast.frames).to_dict()
    if dense.latents is not None and fast.latents is not None:
        near["latent_error"] = metrics.latent_error(dense.latents, fast.latents)
    speedup = {
        "denoise": dense.times.denoise / fast.times.denoise,
        "total": dense.times.total / fast.times.total,
    }
    if dense.times.steps:
        speedup["median_step"] = median(dense.times.steps) / median(fast.times.steps)
    return {
        "method": ran["method"],
        "kept": ran["kept"],
        "speedup": speedup,
        "times": {"dense": asdict(dense.times), "accelerated": asdict(fast.times)},
        "quality": near,
        "attention": ran,
    }


def _write(folder: Path, data: dict[str, Any], dense: Result, fast: Result) -> dict[str, Path]:
    kind = "mp4" if len(dense.frames) > 1 else "png"
    names = ("dense", f"accelerated ({data['method']})")
    clips = {
        "dense": dense.frames,
        "accelerated": fast.frames,
        "side_by_side": video.side_by_side(dense.frames, fast.frames, names),
    }
    files = {name: folder / f"{name}.{kind}" for name in clips}
    for name, path in files.items():
        video.save(path, clips[name], data["fps"])
    files["contact_sheet"] = folder / "contact_sheet.png"
    sheet = video.contact_sheet(dense.frames, fast.frames, names)
    video.save(files["contact_sheet"], sheet[None])
    data["files"] = {name: path.name for name, path in files.items()}
    files["report"] = folder / "report.json"
    with video.atomic(files["report"]) as temporary:
        temporary.write_text(json.dumps(data, indent=2, default=str) + "\n")
    files["page"] = folder / "report.html"
    with video.atomic(files["page"]) as temporary:
        temporary.write_text(html.page(data, folder), encoding="utf-8")
    return files


def placement(pipe: Any) -> dict[str, str]:
    """Device and dtype of a pipeline, as text."""
    transformer = getattr(pipe, "transformer", None) or pipe.transformer_2
    dtype = str(transformer.dtype).removeprefix("torch.")
    return {"device": str(pipe._execution_device), "dtype": dtype}


def machine(pipe: Any) -> dict[str, Any]:
    """What the figures were taken on."""
    device = torch.device(placement(pipe)["device"])
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "dit_accel": __version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def recipe(
    config: AccelConfig,
    where: dict[str, str],
    values: dict[str, Any],
    seed: int,
    boost: Boost = STOCK,
) -> str:
    """The Python lines that make the accelerated clip again."""
    kind = where["pipeline"]
    embedded = where["model"] in (EMBEDDED_NAME, str(EMBEDDED))
    arguments = [f"    {name}={_literal(value)}," for name, value in values.items()]
    name = "EMBEDDED" if embedded else _literal(where["model"])
    load = f"pipe = {kind}.from_pretrained({name}, torch_dtype=torch.{where['dtype']})"
    lines = [
        "import torch",
        f"from diffusers import {kind}",
        *(["from diffusers.utils import load_image"] if "image" in values else []),
        "",
        "import dit_accel",
        *(["from dit_accel.boost import Boost"] if boost != STOCK else []),
        *(["from dit_accel.loading import EMBEDDED"] if embedded else []),
        "",
        load if where["device"] == "cpu" else f"{load}.to({_literal(where['device'])})",
        *([f"{boost}.switch_on(pipe)"] if boost != STOCK else []),
        f"handle = dit_accel.accelerate(pipe, {_shortest(config)})",
        "output = pipe(",
        *arguments,
        f'    generator=torch.Generator("cpu").manual_seed({seed}),',
        ")",
        "print(handle.report())",
    ]
    return "\n".join(lines)


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Image.Image):
        return f"load_image({_literal(str(getattr(value, 'filename', 'picture.png')))})"
    return repr(value)


def _shortest(config: AccelConfig) -> str:
    plain = AccelConfig(config.method)
    return _spelled(config.method) if config == plain else _spelled(config)


def _spelled(value: Any) -> str:
    """A dataclass as Python text, without the fields that have their default value."""
    if not is_dataclass(value):
        return _literal(value)
    return f"dit_accel.{type(value).__name__}({', '.join(_changed(value))})"


def _changed(value: Any) -> Iterable[str]:
    for item in fields(value):
        mine, default = getattr(value, item.name), item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        if mine != default:
            yield f"{item.name}={_spelled(mine)}"
