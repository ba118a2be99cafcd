"""report.html: one self-contained page from the data of report.json and the files beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from dit_accel import charts

EMBED_BELOW = 8 * 2**20
TYPES = {".mp4": "video/mp4", ".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}


def page(data: dict[str, Any], folder: Path) -> str:
    """The page for one comparison; `folder` holds the files that `data["files"]` names."""
    template = Template(resources.files("dit_accel").joinpath("page.html").read_text("utf-8"))
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


def headline(data: dict[str, Any]) -> str:
    """Such as "1.30× faster, 31.2 dB": ratio of the denoising loops, mean PSNR against dense."""
    ratio, near = data["speedup"]["denoise"], data["quality"]
    speed = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    skipped = data["kept"] < 1 or data.get("boost", {}).get("step_cache") is not None
    if not skipped:  # any difference in time is noise
        speed = "no attention skipped"
    close = "identical" if min(near["psnr"]) >= 100 else f"{near['psnr_mean']:.1f}\u00a0dB"
    return f"{speed}, {close}"


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


def _device(machine: dict[str, Any]) -> str:
    return machine["gpu"] or f"{machine['threads']} threads of {machine['cpu']}"


def seconds(value: float) -> str:
    """As many digits as matter: "190 s", "16.6 s", "0.06 s"."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f} s"


def time_rows(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(phase, dense, accelerated, speed-up) as text; no speed-up for what is not accelerated."""
    sides = [dict(data["times"][side]) for side in ("dense", "accelerated")]
    names = {"encode": "text", "denoise": "denoising loop", "decode": "decoding"}
    names |= {"total": "whole run"}
    if "median_step" in data["speedup"]:
        names["median_step"] = "median step"
        for side in sides:
            side["median_step"] = median(side["steps"])
    ratios = {key: f"{ratio:.2f}×" for key, ratio in data["speedup"].items()}
    return [
        (name, *(seconds(side[key]) for side in sides), ratios.get(key, ""))
        for key, name in names.items()
    ]


def _times(data: dict[str, Any]) -> str:
    return "".join(
        f"<tr{' class=strong' if name == 'denoising loop' else ''}><th scope=row>{name}</th>"
        f"{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        for name, *values in time_rows(data)
    )


def _closeness(data: dict[str, Any]) -> str:
    near, many = data["quality"], len(data["quality"]["psnr"]) > 1
    worst = f"<span>worst frame {min(near['psnr']):.1f} dB</span>" if many else ""
    rows = {"PSNR": f"{near['psnr_mean']:.1f} dB{worst}", "SSIM": f"{near['ssim_mean']:.4f}"}
    if "latent_error" in near:
        rows["latents, relative error"] = f"{near['latent_error']:.3f}"
    if many:
        before, after = near["flicker"]
        rows["change from frame to frame"] = f"{after:.2f}<span>dense {before:.2f}</span>"
    return "".join(f"<tr><th scope=row>{k}</th><td>{v}</td></tr>" for k, v in rows.items())


def _ran(attention: dict[str, Any]) -> str:
    sparse = sum(layer["sparse"] for layer in attention["layers"])
    dense = sum(layer["dense"] for layer in attention["layers"])
    served = ", ".join(f"{escape(n)} × {c}" for n, c in attention["implementations"].items())
    marks = dict.fromkeys(attention["unplanned"], ", not planned")
    reasons = "".join(
        f"<li>{count} × {escape(why)}{marks.get(why, '')}</li>"
        for why, count in attention["fallbacks"].items()
    )
    return (
        f"<p>{sparse} attention calls ran sparse{f' ({served})' if served else ''}, {dense} ran "
        f"dense{':' if reasons else '.'}</p><ul>{reasons}</ul>"
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
