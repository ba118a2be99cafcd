"""The results as HTML: from the record of a pair to what stands below the players."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from dit_accel.generation.trained import Trained
from dit_accel.pages import charts, figures
from dit_accel.pages.render import render

SIDES = ("left", "right")


def results(data: dict[str, Any], base: str) -> Markup:
    """Everything below the players; `base` is the URL of the folder with the files."""
    left, right = (data[side]["times"] for side in SIDES)
    near = data["quality"]
    html = render(
        "app/results.html",
        prompt=data["prompt"],
        headline=headline(data),
        lead=_lead(data),
        short=too_short(data),
        times=figures.time_rows(left, right, data["speedup"]),
        steps=charts.step_chart({"left": left["steps"], "right": right["steps"]}),
        closeness=figures.closeness_rows(near, "left"),
        frames=_frame_charts(near),
        ran=_ran(data),
        python=data["right"]["python"].strip(),
        files=_files(data, base),
        fine_print=_fine_print(data),
    )
    return Markup(html)  # the template has escaped every value


def headline(data: dict[str, Any]) -> str:
    """Such as "1.30× faster, 31.2 dB"."""
    return figures.headline(data["speedup"]["denoise"], data["quality"], skipped(data))


def skipped(data: dict[str, Any]) -> bool:
    """Did either side leave something out?"""
    reports = [data[side]["report"] for side in SIDES if data[side]["report"]]
    pruned = any(step["tokens"] < 1 for report in reports for step in report["steps"])
    fewer = any(report["kept"] < 1 for report in reports)
    return fewer or pruned or any(data[side].get("skips") for side in SIDES)


def too_short(data: dict[str, Any]) -> str:
    """Why nothing was skipped, where the clip was too short for it, and else ""."""
    if skipped(data):
        return ""
    report = data["right"]["report"] or {"unplanned": {}}
    return next((why for why in report["unplanned"] if "crossover" in why), "")


def _lead(data: dict[str, Any]) -> str:
    left, right = (figures.seconds(data[side]["times"]["denoise"]) for side in SIDES)
    report = data["right"]["report"]
    kept = f", with {report['kept']:.0%} of the attention work" if report else ""
    return f"Right took {right} for the denoising loop, left {left}{kept}."


def _frame_charts(near: dict[str, Any]) -> dict[str, Markup]:
    if len(near["psnr"]) < 2 or min(near["psnr"]) >= figures.IDENTICAL_DB:
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
            "full": figures.full_steps(data[side]["cells"]),
            "pruned": _pruned(data[side]["report"]),
            "map": _map(data[side]),
        }
        for side in shown
    ]


def _map(side: dict[str, Any]) -> Markup | None:
    """Kept blocks of each layer and step, where any were skipped."""
    if side["report"]["kept"] >= 1:
        return None
    return charts.kept_map(side["cells"], [layer["name"] for layer in side["report"]["layers"]])


def _pruned(report: dict[str, Any]) -> str:
    if report["config"]["prune"] is None:
        return ""
    shares = [step["tokens"] for step in report["steps"]]
    part, mean = sum(share < 1 for share in shares), sum(shares) / len(shares)
    return (
        f"{part} of {len(shares)} forwards ran part of the tokens through the middle of the "
        f"model: {mean:.0%} of all tokens over the run."
    )


def _files(data: dict[str, Any], base: str) -> list[tuple[str, str, str]]:
    """(what a link says, its address, the file's name)."""
    kind = "clip" if data["size"][0] > 1 else "picture"
    found = [] if "both" not in data else [("report, in one file", base, "report.html")]
    for side in reversed(SIDES):
        part = data[side]
        home = part.get("base", base)
        found += [
            (f"{side} {kind}", home, part["clip"]),
            *([(f"{side} configuration (JSON)", home, part["config"])] if part["config"] else []),
            (f"{side} as Python", home, part["script"]),
        ]
    if "both" in data:
        found += [("side by side", base, data["both"])]
        found += [("everything measured (JSON)", base, "comparison.json")]
    return [(words, f"{home}/{name}", name) for words, home, name in found]


def _fine_print(data: dict[str, Any]) -> str:
    trained = Trained.from_dict(data.get("checkpoint"))
    weights = data["model"] if trained is None else f"{data['model']} with {trained}"
    return (
        f"{figures.clip(data['size'], data['fps'])}, {data['steps']} steps, seed {data['seed']}, "
        f"{weights} in {data['dtype']} on {figures.device(data['machine'])}. Both sides "
        "start from the same noise; each was timed once, the time of the previews left out."
    )
