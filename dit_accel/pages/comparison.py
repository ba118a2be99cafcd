"""report.html: one self-contained page from the data of report.json and the files beside it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from dit_accel.pages import charts, figures
from dit_accel.pages.render import render

EMBED_BELOW = 8 * 2**20
TYPES = {".mp4": "video/mp4", ".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}
SIDES = ("dense", "accelerated")


def page(data: dict[str, Any], folder: Path) -> str:
    """The page for one comparison; `folder` holds the files that `data["files"]` names.

    data may hold `names` and `labels` of the sides, and `cells`, the share kept [step][layer].
    """
    near, attention = data["quality"], data["attention"]
    names, cells = data.get("names", SIDES), data.get("cells")
    layers = attention["layers"] if attention else []
    count, height, width = data["size"]
    dense, fast = (data["times"][side]["steps"] for side in SIDES)
    return render(
        "pages/comparison.html",
        prompt=data["prompt"],
        headline=headline(data),
        summary=_summary(data),
        dense=_source(folder / data["files"]["dense"]),
        accelerated=_source(folder / data["files"]["accelerated"]),
        names=names,
        labels=data.get("labels", ("", data["method"])),
        still=count == 1,
        ratio=f"{width} / {height}",
        fps=data["fps"],
        last=count - 1,
        times=times(data),
        steps=charts.step_chart({"dense": dense, "fast": fast}),
        frames=charts.lines({"fast": near["psnr"]}, "frame", "dB") if count > 1 else None,
        closeness=figures.closeness_rows(near, names[0]),
        ran=figures.ran(attention) if attention else None,
        full=figures.full_steps(cells) if cells else "",
        map=charts.kept_map(cells, [layer["name"] for layer in layers]) if cells else None,
        layers=layers,
        sheet=_source(folder / data["files"]["contact_sheet"]),
        python=data["python"],
        command=data["command"],
        settings=_settings(data, names[1]),
    )


def headline(data: dict[str, Any]) -> str:
    """Such as "1.30× faster, 31.2 dB"."""
    skipped = data["kept"] < 1 or data.get("boost", {}).get("step_cache") is not None
    return figures.headline(data["speedup"]["denoise"], data["quality"], skipped)


def times(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(phase, dense, accelerated, speed-up) as text."""
    dense, accelerated = (data["times"][side] for side in SIDES)
    return figures.time_rows(dense, accelerated, data["speedup"])


def _source(path: Path) -> str:
    """A data: URI, or the bare name when the file is too large to embed."""
    if path.stat().st_size >= EMBED_BELOW:
        return path.name
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _summary(data: dict[str, Any]) -> str:
    dense, fast = (figures.seconds(data["times"][side]["denoise"]) for side in SIDES)
    return (
        f"The denoising loop took {fast} instead of {dense} on {figures.device(data['machine'])}, "
        f"with {data['kept']:.0%} of the attention work kept."
    )


def _settings(data: dict[str, Any], side: str) -> dict[str, Any]:
    machine, boost = data["machine"], data.get("boost", {})
    config = data["attention"]["config"] if data["attention"] else {"method": {"name": "dense"}}
    method, prune, cache = config["method"], config.get("prune"), boost.get("step_cache")
    beside = [f"{prune['keep']:.0%} of the tokens in pruned steps"] if prune else []
    beside += ["compiled blocks, dense run too"] if boost.get("compile") else []
    beside += ["CUDA graphs, dense run too"] if boost.get("graphs") else []
    beside += [f"step cache at {cache:g}, {side} run only"] if cache is not None else []
    eight = boost.get("quantize")
    beside += [f"linear layers in {eight}, {side} run only"] if eight else []
    beside += [f"LoRA {boost['lora']}, {side} run only"] if boost.get("lora") else []
    sides = zip(data.get("names", SIDES), data.get("memory", {}).values(), strict=False)
    told = [f"{name}: {said}" for name, one in sides if (said := figures.memory(one))]
    found = data.get("checkpoint")
    trained = f"{', '.join(found['files'])} ({found['family']})" if found else None
    return {
        "model": f"{data['model']} ({data['pipeline']}, {data['dtype']})",
        **({"checkpoint": trained} if trained else {}),
        "clip": figures.clip(data["size"], data["fps"]),
        "steps": len(data["times"]["dense"]["steps"]) or "not reported by this pipeline",
        **({"sampler": data["sampler"]} if data.get("sampler") else {}),
        "seed": data["seed"],
        "method": ", ".join(f"{k} {v}" if k != "name" else f"{v}" for k, v in method.items()),
        **({"beside it": "; ".join(beside)} if beside else {}),
        **({"memory": "; ".join(told)} if told else {}),
        "machine": f"{figures.device(machine)}, {machine['system']}",
        "versions": ", ".join(
            f"{n} {machine[n]}" for n in ("dit_accel", "torch", "diffusers", "python")
        ),
    }
