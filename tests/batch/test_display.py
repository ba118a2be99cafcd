"""What a run shows in its three forms, and the page it leaves."""

import io
import json
import re

import pytest
from rich.console import Console
from typed import NASTY, Reader, shown_as_text

from dit_accel.batch.display import Display
from dit_accel.batch.gallery import write_gallery
from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import Manifest
from dit_accel.batch.summary import summarize
from dit_accel.media import owner as owners

REPORT = {"method": "topk", "kept": 0.25, "size": [9, 48, 64]}


@pytest.fixture
def manifest(tmp_path):
    jobs = [(n, Job(f"a cat <{n}>", name=f"clip-{n}")) for n in range(1, 5)]
    found = Manifest(tmp_path)
    found.plan(jobs, [(5, "unknown key '<b>'")])
    return found


def work(manifest):
    """Two clips, one failure; the fourth job waits."""
    me = owners.me()
    manifest.beat(me, "cpu", "clip-1: denoise", 1, 2)
    for number in range(3):
        [row] = manifest.claim(me)
        if number == 2:
            manifest.fail(row, me, "no [luck] & <no> reason")
            continue
        (manifest.folder / f"{row.output}.mp4").write_bytes(b"clip")
        drift = {"psnr": 30.0, "ssim": 0.9, "seconds_dense": 4.0}
        report = {**REPORT, "drift": drift, "dense_file": "d.mp4"} if number else REPORT
        manifest.finish(row, me, f"{row.output}.mp4", 2.0, report)


def test_plain_lines_in_a_log(manifest):
    out = io.StringIO()
    with Display(manifest, console=Console(file=out, width=60)):
        work(manifest)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r" +3/4  done      clip-1: 2\.00 s, about \d+ s left", lines[0])
    assert lines[2].endswith("failed    clip-3: no [luck] & <no> reason")


def test_bars_on_a_terminal(manifest):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Display(manifest, console=console) as display:
        work(manifest)
        display.update()
    text = out.getvalue()
    assert "jobs, 1 failed" in text and "cpu clip-1: denoise" in text and "3/4" in text


def test_one_json_object_an_event(manifest):
    out = io.StringIO()
    with Display(manifest, json_events=True, stream=out) as display:
        work(manifest)
        display.update()
        display.update()
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events] == [
        "started",
        "done",
        "started",
        "done",
        "started",
        "failed",
    ]
    assert events[-1] | {"output": "clip-3", "done": 2, "failed": 1, "waiting": 1} == events[-1]
    assert events[-1]["text"] == "no [luck] & <no> reason"


def test_only_what_is_new_is_shown(manifest):
    work(manifest)
    out = io.StringIO()
    with Display(manifest, json_events=True, stream=out):
        manifest.note("worker", "news")
    assert [json.loads(line)["text"] for line in out.getvalue().splitlines()] == ["news"]


def test_what_a_job_file_says_is_shown_and_never_run(tmp_path):
    pages = []
    for words in (NASTY, "a cat"):
        folder = tmp_path / str(len(pages))
        folder.mkdir()
        manifest = Manifest(folder)
        report = {**REPORT, "after_out_of_memory": [words]}
        manifest.plan([(1, Job(words)), (2, Job("a dog"))], [(3, words)])
        for fails in (False, True):
            [row] = manifest.claim(owners.me())
            if fails:
                manifest.fail(row, owners.me(), words)
            else:
                manifest.finish(row, owners.me(), f"{row.output}.mp4", 2.0, report)
        pages.append(write_gallery(manifest).read_text())
    assert shown_as_text(*pages)
    assert sum(NASTY in text for text in Reader(pages[0]).shown) == 4  # title, note, two lists


def test_the_page_and_the_summary(manifest):
    work(manifest)
    page = write_gallery(manifest).read_text()
    assert page.count("<video ") == 2 and page.count("preload=") == 2
    assert 'data-src="clip-1.mp4" style="aspect-ratio: 64 / 48"' in page
    assert "a cat &lt;1&gt;" in page and "a cat <1>" not in page
    assert "25% of attention kept" in page and "30.0 dB, held against" in page
    assert "no [luck] &amp; &lt;no&gt; reason" in page
    assert "Line 5" in page and "unknown key &#39;&lt;b&gt;&#39;" in page
    assert "2 clips, 1 failed, 1 line refused, 1 not done yet" in page
    assert not re.search(r"https?://", page)
    summary = summarize(manifest)
    assert (summary.done, summary.failed, summary.waiting, summary.ok) == (2, 1, 1, False)
    assert summary.drift["speedup"] == 2.0
    for words in ("2 of 4 jobs done", "line 5 refused", "clip-3: no [luck]", "1 not done yet"):
        assert words in str(summary)
