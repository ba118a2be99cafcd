"""index.html: what came of a batch, on one static page beside the clips."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from dit_accel.batch.jobs import DENSE
from dit_accel.batch.manifest import Manifest
from dit_accel.batch.summary import Summary, rows, summarize, write_results
from dit_accel.media.files import write_text
from dit_accel.pages.figures import decibels, seconds
from dit_accel.pages.render import render

PAGE = "index.html"


def write_gallery(manifest: Manifest) -> Path:
    """Write the page beside the clips; they load as they come into view."""
    path = manifest.folder / PAGE
    return write_text(path, page(summarize(manifest, everything=True), rows(manifest)))


def publish(manifest: Manifest) -> None:
    """Gallery and results.jsonl: not worth a clip, so a full disk only leaves them as they were."""
    with suppress(OSError):
        write_gallery(manifest)
        write_results(manifest)


def page(summary: Summary, jobs: list[dict[str, object]]) -> str:
    """The page's HTML."""
    return render(
        "batch/gallery.html",
        name=Path(summary.folder).absolute().name,
        done=summary.done,
        facts=_facts(summary),
        cards=[_card(job) for job in jobs if job["state"] == "done"],
        troubles={
            "Failed": [(job["output"], job["error"] or "") for job in summary.failures],
            "Refused": [(f"Line {row['line']}", row["reason"]) for row in summary.refused],
        },
    )


def _facts(summary: Summary) -> list[str]:
    parts = [_count(summary.done, "clip")]
    parts += [f"{summary.failed} failed"] if summary.failed else []
    parts += [f"{_count(len(summary.refused), 'line')} refused"] if summary.refused else []
    parts += [f"{summary.waiting} not done yet"] if summary.waiting else []
    if summary.done:
        parts.append(f"{seconds(summary.seconds / summary.done)} a clip")
    if summary.drift:
        parts.append(
            f"{_count(int(summary.drift['clips']), 'clip')} held against dense: "
            f"{decibels(summary.drift['psnr'])} on average, "
            f"{decibels(summary.drift['psnr_worst'])} at worst"
        )
    return parts


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _card(job: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a clip; `shape` keeps its place until it is loaded."""
    asked, report = job["job"], job["report"]
    _, height, width = report["size"]
    kept, drift = report.get("kept"), report.get("drift")
    facts = [_method(asked.get("method", "")), f"seed {asked.get('seed', 0)}"]
    facts += [seconds(job["seconds"])]
    facts += [f"{kept:.0%} of attention kept"] if kept is not None else []
    return {
        "prompt": asked["prompt"],
        "file": job["file"],
        "moving": job["file"].endswith(".mp4"),
        "shape": f"{width} / {height}",
        "facts": facts,
        "drift": decibels(drift["psnr"]) if drift else "",
        "dense": report.get("dense_file"),
        "given_up": report.get("after_out_of_memory", ()),
    }


def _method(text: str) -> str:
    return Path(text).stem if text.endswith(".json") else text or DENSE
