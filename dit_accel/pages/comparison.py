"""report.html: one self-contained page from the data of report.json and the files beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from dit_accel.pages import charts
from dit_accel.pages.figures import _closeness, _device, _ran, _times, headline, seconds

EMBED_BELOW = 8 * 2**20
TYPES = {".mp4": "video/mp4", ".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}


def page(data: dict[str, Any], folder: Path) -> str:
    """The page for one comparison; `folder` holds the files that `data["files"]` names."""
    template = Template(
        resources.files("dit_accel.pages").joinpath("comparison.html").read_text("utf-8")
    )
    near = data["quality"]
    count, height, width = data["size"]
    steps = [data["times"][side]["steps"] for side in ("dense", "accelerated")]
    stepped = bool(steps[0])
    scale, unit = (1000, "ms") if max(max(s, default=0) for s in steps) < 1 else (1, "s")
    return template.substitute(
        title=escape(data["prompt"]),
        headline=escape(headline(data)),
        summary=_summary(data),
        dense=_player(folder / data["files"]["dense"]),
        accelerated=_player(folder / data["files"]["accelerated"]),
        method=escape(data["method"]),
        moving="" if count > 1 else "still",
        ratio=f"{width} / {height}",
        fps=data["fps"],
        last=count - 1,
        times=_times(data),
        steps=_step_chart(steps, scale, unit) if stepped else "",
        stepped="" if stepped else "unstepped",
        unit=unit,
        frames=_frame_chart(near) if count > 1 else "",
        closeness=_closeness(data),
        ran=_ran(data["attention"]),
        layers=_layers(data["attention"]["layers"]),
        sheet=_source(folder / data["files"]["contact_sheet"]),
        python=escape(data["python"]),
        command=escape(data["command"]),
        settings=_pairs(_settings(data)),
    )


def _source(path: Path) -> str:
    """A data: URI, or the bare name when the file is too large to embed."""
    if path.stat().st_size >= EMBED_BELOW:
        return path.name
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _player(path: Path) -> str:
    if path.suffix == ".mp4":
        return f'<video muted playsinline preload="auto" src="{_source(path)}"></video>'
    return f'<img alt="{path.stem}" src="{_source(path)}">'


def _summary(data: dict[str, Any]) -> str:
    dense, fast = data["times"]["dense"], data["times"]["accelerated"]
    return (
        f"The denoising loop took {seconds(fast['denoise'])} instead of "
        f"{seconds(dense['denoise'])} on {escape(_device(data['machine']))}, with "
        f"{data['kept']:.0%} of the attention work kept."
    )


def _layers(layers: Sequence[dict[str, Any]]) -> str:
    return "".join(
        f"<tr><th scope=row>{escape(row['name'])}</th><td>{row['sparse']}</td><td>{row['dense']}"
        f"</td><td><i class=bar style='--share:{row['kept']:.3f}'></i>{row['kept']:.0%}</td></tr>"
        for row in layers
    )


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    count, height, width = data["size"]
    machine = data["machine"]
    config, boost = data["attention"]["config"], data.get("boost", {})
    method, prune, cache = config["method"], config["prune"], boost.get("step_cache")
    beside = [f"{prune['keep']:.0%} of the tokens in pruned steps"] if prune else []
    beside += ["compiled blocks, dense run too"] if boost.get("compile") else []
    beside += [f"step cache at {cache:g}, accelerated run only"] if cache is not None else []
    beside += [f"LoRA {boost['lora']}, accelerated run only"] if boost.get("lora") else []
    clip = f"{width} × {height}" + (f", {count} frames at {data['fps']:g} fps" if count > 1 else "")
    return {
        "model": f"{data['model']} ({data['pipeline']}, {data['dtype']})",
        "clip": clip,
        "steps": len(data["times"]["dense"]["steps"]) or "not reported by this pipeline",
        "seed": data["seed"],
        "method": ", ".join(f"{k} {v}" if k != "name" else f"{v}" for k, v in method.items()),
        **({"beside it": "; ".join(beside)} if beside else {}),
        "machine": f"{_device(machine)}, {machine['system']}",
        "versions": ", ".join(
            f"{n} {machine[n]}" for n in ("dit_accel", "torch", "diffusers", "python")
        ),
    }


def _pairs(values: dict[str, Any]) -> str:
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())


def _step_chart(steps: Sequence[Sequence[float]], scale: int, unit: str) -> str:
    dense, fast = ([v * scale for v in line] for line in steps)
    return charts.lines({"dense": dense, "fast": fast}, "step", unit, from_zero=True)


def _frame_chart(near: dict[str, Any]) -> str:
    return charts.lines({"fast": near["psnr"]}, "frame", "dB")
