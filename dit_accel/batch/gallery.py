"""index.html: what came of a batch, on one static page beside the clips."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from dit_accel.batch.jobs import DENSE
from dit_accel.batch.manifest import Manifest
from dit_accel.batch.summary import Summary, rows, summarize
from dit_accel.media.files import atomic
from dit_accel.media.quality import IDENTICAL_DB
from dit_accel.pages.figures import seconds

PAGE = "index.html"


def write_gallery(manifest: Manifest) -> Path:
    """Write the page beside the clips; they load as they come into view."""
    path = manifest.folder / PAGE
    text = page(summarize(manifest), rows(manifest))
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def page(summary: Summary, jobs: list[dict[str, Any]]) -> str:
    """The page's HTML."""
    template = Template(
        resources.files("dit_accel.batch").joinpath("gallery.html").read_text("utf-8")
    )
    done = [job for job in jobs if job["state"] == "done"]
    name = Path(summary.folder).absolute().name
    search = '<input type="search" placeholder="Filter" aria-label="Filter the clips">'
    return template.substitute(
        title=escape(f"{name}: {summary.done} clips"),
        heading=escape(name),
        facts=_facts(summary),
        search=search if len(done) > 8 else "",
        cards="\n".join(_card(job) for job in done),
        troubles=_troubles(summary),
    )


def _facts(summary: Summary) -> str:
    parts = [_count(summary.done, "clip")]
    parts += [f"{summary.failed} failed"] if summary.failed else []
    parts += [f"{_count(len(summary.refused), 'line')} refused"] if summary.refused else []
    parts += [f"{summary.waiting} not done yet"] if summary.waiting else []
    if summary.done:
        parts.append(f"{seconds(summary.seconds / summary.done)} a clip")
    if summary.drift:
        parts.append(
            f"{_count(summary.drift['clips'], 'clip')} held against dense: "
            f"{_decibels(summary.drift['psnr'])} on average, "
            f"{_decibels(summary.drift['psnr_worst'])} at worst"
        )
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _decibels(value: float) -> str:
    return "identical" if value >= IDENTICAL_DB else f"{value:.1f} dB"


def _card(job: dict[str, Any]) -> str:
    asked, report = job["job"], job["report"]
    facts = [_method(asked.get("method", "")), f"seed {asked.get('seed', 0)}"]
    facts += [seconds(job["seconds"])]
    kept = report.get("kept")
    facts += [f"{kept:.0%} of attention kept"] if kept is not None else []
    lines = [", ".join(facts)]
    if "drift" in report:
        link = f'<a href="{quote(report["dense_file"])}">dense</a>'
        lines.append(f"{_decibels(report['drift']['psnr'])}, held against {link}")
    if "after_out_of_memory" in report:
        lines.append(escape("after out of memory: " + ", ".join(report["after_out_of_memory"])))
    notes = "".join(f"<p>{line}</p>" for line in lines)
    media, title = _media(job["file"], report["size"]), escape(asked["prompt"])
    return f"<article>{media}<h3>{title}</h3>{notes}</article>"


def _method(text: str) -> str:
    return escape(Path(text).stem if text.endswith(".json") else text or DENSE)


def _media(file: str, size: list[int]) -> str:
    """The clip or picture, its place kept until it is loaded; a click opens the file."""
    name, shape = quote(file), f'style="aspect-ratio: {size[2]} / {size[1]}"'
    if file.endswith(".mp4"):
        tag = f'<video data-src="{name}" {shape} muted loop playsinline preload="none"></video>'
    else:
        tag = f'<img src="{name}" {shape} loading="lazy" alt="">'
    return f'<a href="{name}">{tag}</a>'


def _troubles(summary: Summary) -> str:
    failed = [
        f"<li>{escape(job['output'])}<span>{escape(job['error'] or '')}</span></li>"
        for job in summary.failures
    ]
    refused = [
        f"<li>Line {row['line']}<span>{escape(row['reason'])}</span></li>"
        for row in summary.refused
    ]
    return _list("Failed", failed) + _list("Refused", refused)


def _list(title: str, items: list[str]) -> str:
    return f"<section><h2>{title}</h2><ul>{''.join(items)}</ul></section>" if items else ""
