"""report.html: one self-contained page from the data of report.json and the files beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
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
        steps=_step_chart(data),
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
    identical = min(near["psnr"]) >= 100
    return f"{speed}, {'identical' if identical else format(near['psnr_mean'], '.1f') + ' dB'}"


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
    return (
        f"{value:.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"
    )


def _times(data: dict[str, Any]) -> str:
    dense, fast = data["times"]["dense"], data["times"]["accelerated"]
    names = {"encode": "text", "denoise": "denoising", "decode": "decoding", "total": "whole run"}
    rows = [
        f"<tr{' class=strong' if key == 'denoise' else ''}><th scope=row>{name}</th>"
        f"<td>{seconds(dense[key])}</td><td>{seconds(fast[key])}</td>"
        f"<td>{_ratio(dense[key], fast[key]) if key in ('denoise', 'total') else ''}</td></tr>"
        for key, name in names.items()
    ]
    return "".join(rows)


def _ratio(dense: float, fast: float) -> str:
    return f"{dense / fast:.2f}×"


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
    method = data["attention"]["config"]["method"]
    clip = f"{width} × {height}" + (f", {count} frames at {data['fps']:g} fps" if count > 1 else "")
    return {
        "model": f"{data['model']} ({data['pipeline']}, {data['dtype']})",
        "clip": clip,
        "steps": len(data["times"]["dense"]["steps"]) or "not reported by this pipeline",
        "seed": data["seed"],
        "method": ", ".join(f"{k} {v}" if k != "name" else f"{v}" for k, v in method.items()),
        "machine": f"{_device(machine)}, {machine['system']}",
        "versions": ", ".join(
            f"{n} {machine[n]}" for n in ("dit_accel", "torch", "diffusers", "python")
        ),
    }


def _pairs(values: dict[str, Any]) -> str:
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())


def _step_chart(data: dict[str, Any]) -> str:
    dense, fast = (data["times"][side]["steps"] for side in ("dense", "accelerated"))
    if not dense:
        return ""
    scale, unit = (1000, "ms") if max(*dense, *fast) < 1 else (1, "s")
    lines = {"dense": [v * scale for v in dense], "fast": [v * scale for v in fast]}
    return charts.lines(lines, "step", unit, from_zero=True)


def _frame_chart(near: dict[str, Any]) -> str:
    return charts.lines({"fast": near["psnr"]}, "frame", "dB")
