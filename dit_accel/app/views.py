"""The results as HTML: from the record of a pair to what stands below the players."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from dit_accel.pages import charts, figures
from dit_accel.pages.render import render

SIDES = ("left", "right")


def results(data: dict[str, Any], base: str) -> str:
    """Everything below the players; `base` is the URL of the folder with the files."""
    left, right = (data[side]["times"] for side in SIDES)
    near = data["quality"]
    return render(
        "app/results.html",
        prompt=data["prompt"],
        headline=figures.headline(data["speedup"]["denoise"], near, _skipped(data)),
        lead=_lead(data),
        times=figures.time_rows(left, right, data["speedup"]),
        steps=charts.step_chart({"left": left["steps"], "right": right["steps"]}),
        closeness=figures.closeness_rows(near, "left"),
        frames=_frame_charts(near),
        ran=_ran(data),
        python=data["right"]["python"].strip(),
        files=_files(data),
        base=base,
        fine_print=_fine_print(data),
    )


def _skipped(data: dict[str, Any]) -> bool:
    reports = (data[side]["report"] for side in SIDES)
    return any(report is not None and report["kept"] < 1 for report in reports)


def _lead(data: dict[str, Any]) -> str:
    left, right = (figures.seconds(data[side]["times"]["denoise"]) for side in SIDES)
    report = data["right"]["report"]
    kept = f", with {report['kept']:.0%} of the attention work" if report else ""
    return f"Right took {right} for the denoising loop, left {left}{kept}."


def _frame_charts(near: dict[str, Any]) -> dict[str, Markup]:
    if len(near["psnr"]) < 2:
        return {}
    return {
        "PSNR of each frame": charts.lines({"right": near["psnr"]}, "frame", "dB"),
        "SSIM of each frame": charts.lines({"right": near["ssim"]}, "frame", ""),
    }


def _ran(data: dict[str, Any]) -> list[dict[str, Any]]:
    """What ran on each side that was accelerated; named where both were."""
    shown = [side for side in SIDES if data[side]["report"]]
    return [
        {
            "name": side if len(shown) > 1 else "",
            "calls": figures.ran(data[side]["report"]),
            "pruned": _pruned(data[side]["report"]),
            "map": heat_map(data[side]["cells"], data[side]["report"]["layers"]),
        }
        for side in shown
    ]


def _pruned(report: dict[str, Any]) -> str:
    if report["config"]["prune"] is None:
        return ""
    shares = [step["tokens"] for step in report["steps"]]
    part, mean = sum(share < 1 for share in shares), sum(shares) / len(shares)
    return (
        f"{part} of {len(shares)} forwards ran part of the tokens through the middle of the "
        f"model: {mean:.0%} of all tokens over the run."
    )


def heat_map(cells: list[list[float | None]], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Kept share of attention work: a row per layer, a column per step, about ten steps named."""
    stride = max(1, -(-len(cells) // 10))
    rows = [
        {
            "name": layer["name"],
            "cells": [_cell(step, layer["name"], row[number]) for step, row in enumerate(cells)],
        }
        for number, layer in enumerate(layers)
    ]
    return {
        "rows": rows if cells else [],
        "steps": [step + 1 if step % stride == 0 else "" for step in range(len(cells))],
    }


def _cell(step: int, layer: str, kept: float | None) -> dict[str, Any] | None:
    if kept is None:
        return None
    what = "dense" if kept >= 1 else f"{kept:.0%} kept"
    return {"kept": kept, "title": f"step {step + 1}, {layer}: {what}"}


def _files(data: dict[str, Any]) -> dict[str, str]:
    """What a link says → the file it gives."""
    left, right = (data[side] for side in SIDES)
    kind = "clip" if data["size"][0] > 1 else "picture"
    return {
        f"right {kind}": right["clip"],
        f"left {kind}": left["clip"],
        "side by side": data["both"],
        "right configuration (JSON)": right["config"],
        "left configuration (JSON)": left["config"],
        "right as Python": right["script"],
        "left as Python": left["script"],
        "everything measured (JSON)": "comparison.json",
    }


def _fine_print(data: dict[str, Any]) -> str:
    return (
        f"{figures.clip(data['size'], data['fps'])}, {data['steps']} steps, seed {data['seed']}, "
        f"{data['model']} in {data['dtype']} on {figures.device(data['machine'])}. Both sides "
        "start from the same noise; each was timed once, the time of the previews left out."
    )


def alert(error: Exception) -> str:
    """An error as a visitor reads it: only a ValueError is meant for visitors' eyes."""
    text = str(error).strip()
    if not isinstance(error, ValueError) or not text:
        text = f"the run failed ({type(error).__name__}); the server's log says why"
    sentence = f"{text[0].upper()}{text[1:].rstrip('.')}."
    return Markup("<p role=alert>{}</p>").format(sentence)
