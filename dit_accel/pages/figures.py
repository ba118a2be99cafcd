"""The figures of a comparison as text: headline, times, closeness, what ran."""

from __future__ import annotations

from html import escape
from statistics import median
from typing import Any


def headline(data: dict[str, Any]) -> str:
    """Such as "1.30× faster, 31.2 dB": ratio of the denoising loops, mean PSNR against dense."""
    ratio, near = data["speedup"]["denoise"], data["quality"]
    speed = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    skipped = data["kept"] < 1 or data.get("boost", {}).get("step_cache") is not None
    if not skipped:  # any difference in time is noise
        speed = "no attention skipped"
    close = "identical" if min(near["psnr"]) >= 100 else f"{near['psnr_mean']:.1f}\u00a0dB"
    return f"{speed}, {close}"


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
