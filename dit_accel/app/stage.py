"""The value behind the two players: what each side shows now. stage.js draws it."""

from __future__ import annotations

from typing import Any

from dit_accel.app.ask import Ask
from dit_accel.app.cost import duration
from dit_accel.app.studio import News, Run
from dit_accel.app.views import SIDES
from dit_accel.pages.figures import seconds

WAITING = "waiting for the machine"
WORDS = {
    "encode": "reading the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "warm-up": "warming up",
}


def waiting(ask: Ask, words: str = WAITING) -> dict[str, Any]:
    """Both sides before their turn; the sizes of `ask` are filled in."""
    width, height = ask.size
    value: dict[str, Any] = {"width": width or 1, "height": height or 1, "frames": 1}
    for name, how in zip(SIDES, (ask.left, ask.right), strict=True):
        value[name] = {"label": ask.label(how), "state": words if name == "left" else "next"}
    return value


def said(state: str, value: dict[str, Any], before: int, until: float, left: float) -> str:
    """Where a job stands, in a sentence; "" where its note says it.

    before: how many run before it. until: seconds to its turn. left: seconds of the run itself.
    """
    if state == "waiting":
        if not before:
            return "Waiting for the machine."
        who = "1 run is before yours" if before == 1 else f"{before} runs are before yours"
        return f"{who}: your turn in about {duration(until)}. One runs at a time."
    if state == "running":
        side = "right" if value["right"].get("busy") else "left"
        now = value[side].get("state") or "starting"
        when = f"About {duration(left)} left" if left else "It takes longer than expected"
        return f"{side.capitalize()} side: {now}. {when}."
    return {"done": "Both clips are done.", "cancelled": "Cancelled."}.get(state, "")


def moved(value: dict[str, Any], progress: News) -> dict[str, Any]:
    """`value` after a piece of progress."""
    name = progress.side or "left"
    words = WORDS.get(progress.phase, progress.phase)
    counted = progress.total is not None and progress.phase in ("denoise", "decode")
    side = {
        "label": value[name]["label"],
        "preview": progress.preview or value[name].get("preview"),
        "state": f"{words}, {progress.done} of {progress.total}" if counted else words,
        "busy": True,
        "share": progress.done / progress.total if counted and progress.total else 0,
    }
    return {**value, name: side}


def finished(value: dict[str, Any], run: Run, url: str, fps: float) -> dict[str, Any]:
    """`value` once one side has its clip at `url`."""
    count, height, width = run.result.frames.shape[:3]
    times = run.result.times
    side = _done(run.label, url, times.denoise, count == 1)
    return {**value, run.name: side, **_size(fps, count, height, width)}


def stopped(value: dict[str, Any], words: str) -> dict[str, Any]:
    """`value` with the unfinished sides marked."""
    ends = {
        n: value[n] if value[n].get("src") else {**value[n], "busy": False, "state": words}
        for n in SIDES
    }
    return {**value, **ends}


def recorded(data: dict[str, Any], base: str) -> dict[str, Any]:
    """The value of a finished pair, from its record and the URL of its folder."""
    count, height, width = data["size"]
    ends = {
        n: _done(
            data[n]["label"],
            f"{data[n].get('base', base)}/{data[n]['clip']}",
            data[n]["times"]["denoise"],
            count == 1,
        )
        for n in SIDES
    }
    for name in SIDES:
        if data[name].get("attention"):
            home = data[name].get("base", base)
            ends[name]["attention"] = f"{home}/{data[name]['attention']}"
    return {**ends, **_size(data["fps"], count, height, width)}


def _done(words: str, url: str, denoise: float, still: bool) -> dict[str, Any]:
    return {"label": words, "src": url, "still": still, "time": seconds(denoise)}


def _size(fps: float, count: int, height: int, width: int) -> dict[str, Any]:
    return {"fps": fps, "frames": count, "width": width, "height": height}
