"""What pages and commands say of two runs: times, closeness, what ran. Text, no markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dit_accel.machine import Machine
    from dit_accel.media.quality import Closeness


IDENTICAL_DB = 100  # PSNR of equal frames, as media.quality gives it
PHASES = {
    "encode": "text",
    "denoise": "denoising loop",
    "decode": "decoding",
    "total": "whole run",
    "median_step": "median step",
}


def headline(ratio: float, near: Closeness, skipped: bool = True) -> str:
    """Such as "1.30× faster, 31.2 dB": ratio of the denoising loops, mean PSNR to the first clip.

    near: the quality of report.json. skipped: whether either run left something out; where
    nothing was, any difference in time is noise.
    """
    speed = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    same = min(near["psnr"]) >= IDENTICAL_DB
    close = decibels(IDENTICAL_DB if same else near["psnr_mean"]).replace(" ", "\u00a0")
    return f"{speed if skipped else 'no attention skipped'}, {close}"


def decibels(value: float) -> str:
    """A PSNR: "31.2 dB", or "identical"."""
    return "identical" if value >= IDENTICAL_DB else f"{value:.1f} dB"


def seconds(value: float) -> str:
    """As many digits as matter: "190 s", "16.6 s", "0.26 s", "13 ms", "5.9 ms"."""
    if value < 0.1:
        ms = 1e3 * value
        return f"{ms:.{0 if ms >= 10 or not ms else 1}f} ms"
    return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f} s"


def device(machine: Machine) -> str:
    """The GPU, or the threads of the CPU, of a machine.describe()."""
    count = machine["threads"]
    return machine["gpu"] or f"{count} thread{'s' * (count != 1)} of {machine['cpu']}"


def clip(size: tuple[int, int, int], fps: float) -> str:
    """(frames, height, width) as "832 × 480, 81 frames at 16 fps"."""
    count, height, width = size
    return f"{width} × {height}" + (f", {count} frames at {fps:g} fps" if count > 1 else "")


def time_rows(
    first: Mapping[str, Any], second: Mapping[str, Any], ratios: Mapping[str, float]
) -> list[tuple[str, str, str, str]]:
    """(phase, first, second, speed-up) as text; no speed-up for what has no ratio.

    first, second: seconds of each phase, and of the steps. A median step is told where it has a
    ratio.
    """
    one, other = dict(first), dict(second)
    if "median_step" in ratios:
        for side in (one, other):
            side["median_step"] = median(side["steps"])
    return [
        (
            name,
            seconds(one[key]),
            seconds(other[key]),
            f"{ratios[key]:.2f}×" if key in ratios else "",
        )
        for key, name in PHASES.items()
        if key in one
    ]


def closeness_rows(near: Closeness, other: str) -> list[tuple[str, str, str]]:
    """(measure, value, what stands beside it) as text; `other` names the clip compared with."""
    many = len(near["psnr"]) > 1
    least = min(near["psnr"])
    worst = f"worst frame {least:.1f} dB" if many and least < IDENTICAL_DB else ""
    rows = [
        ("PSNR", decibels(near["psnr_mean"]), worst),
        ("SSIM", f"{near['ssim_mean']:.4f}", ""),
    ]
    if "latent_error" in near:
        rows.append(("latents, relative error", f"{near['latent_error']:.3f}", ""))
    if many:
        before, after = near["flicker"]
        rows.append(("change from frame to frame", f"{after:.2f}", f"{other} {before:.2f}"))
    return rows


class Ran(NamedTuple):
    """Calls of attention by kind, the implementations that served them, why some ran dense."""

    sparse: int
    dense: int
    served: str
    reasons: list[str]


def ran(report: Mapping[str, Any]) -> Ran:
    """What ran, from a report's to_dict()."""
    marks = dict.fromkeys(report["unplanned"], ", not planned")
    return Ran(
        sum(layer["sparse"] for layer in report["layers"]),
        sum(layer["dense"] for layer in report["layers"]),
        ", ".join(f"{name} × {count}" for name, count in report["implementations"].items()),
        [f"{count} × {why}{marks.get(why, '')}" for why, count in report["fallbacks"].items()],
    )


def full_steps(cells: Sequence[Sequence[float | None]]) -> str:
    """What the map of kept blocks shows, in a sentence; "" without one.

    cells: [step][layer], None where a layer was not called.
    """
    known = [[kept for kept in row if kept is not None] for row in cells]
    known = [row for row in known if row]
    some = [row for row in known if min(row) < 1]
    if not known:
        return ""
    full = len(known) - len(some)
    if not some:
        return f"All blocks were read in each of the {len(known)} steps."
    mean = sum(map(sum, some)) / sum(map(len, some))
    whole = f"All blocks were read in {full} of {len(known)} steps, " if full else ""
    rest = (
        f"{mean:.0%} of them in the other {len(some)}."
        if full
        else (f"{mean:.0%} of the blocks were read in each of the {len(known)} steps.")
    )
    return whole + rest


def memory(found: Mapping[str, float | None]) -> str:
    """Such as "peak 7.3 GiB on the GPU, 12% of the denoising waited for weights", or ""."""
    peak, waiting = found.get("peak_gib"), found.get("waiting")
    parts = [] if peak is None else [f"peak {peak:.1f} GiB on the GPU"]
    parts += [] if waiting is None else [f"{waiting:.0%} of the denoising waited for weights"]
    return ", ".join(parts)
