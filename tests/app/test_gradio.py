"""The Gradio app: its form, its queue for scripts, whose places they have, what is closed."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import gradio
import pytest
from asks import FORM, small_studio
from browser import served

from dit_accel.app import blocks, desk, server
from dit_accel.app.ask import Limits
from dit_accel.app.desk import Desk

NONE_SKIPPED = "## no attention skipped, identical"  # of a clip this short
EMPTY = ("", "", "")  # keep, size, steps: the method's and the model's own


def asks(desk, prompt, method="topk", *rest, address="10.0.0.1"):
    """The answers of one call, as they come."""
    request = SimpleNamespace(client=SimpleNamespace(host=address))
    keep, size, steps = rest or EMPTY
    return blocks._Caller(desk).compare(prompt, method, 0, keep, size, steps, "dense", request)


def answers(call):
    async def all_of():
        return [answer async for answer in call]

    return asyncio.run(all_of())


def test_the_form_is_served_and_what_gradio_offers_beside_is_closed(client):
    page = client.get("/gradio")
    assert page.status_code == 200 and "gradio" in page.text
    assert "content-security-policy" not in page.headers and page.headers["x-frame-options"]
    for path in ("/config", "/theme.css", "/gradio_api/info"):
        answer = client.get(path)
        assert answer.status_code == 200 and "'none'" in answer.headers["content-security-policy"]
    for path in ("upload", "vibe-code", "undo-vibe-edit", "stream/x", "run/compare", "x=y"):
        assert client.post(f"/gradio_api/{path}").status_code == 404
    for path in ("login", "monitoring", "monitoring/summary", "logout", "gradio/x", "svelte/x"):
        assert client.get(f"/{path}").status_code == 404
        assert client.post(f"/{path}").status_code == 404


def test_it_says_where_the_run_stands_and_shows_what_the_record_holds(client, monkeypatch):
    monkeypatch.setattr(blocks, "BEAT", 0.002)  # so short a run is over between two of them
    found = answers(asks(client.desk, FORM["prompt"], "topk", "", "64x64", "4"))
    assert any("Left side: " in answer[2] for answer in found[:-1])
    left, right, said, table = found[-1]
    assert [Path(name).name for name in (left, right)] == ["left.mp4", "right.mp4"]
    assert Path(left).is_file() and Path(right).is_file() and said == NONE_SKIPPED
    rows = {row[0]: row[1:] for row in table}
    assert rows["runs"][0] == "dense" and rows["runs"][1].startswith("topk, keep ")
    assert rows["PSNR"][2] == "identical" and rows["denoising loop"][2].endswith("×")


def test_refusals_are_the_page_s_sentences(client, monkeypatch):
    for form, words in (
        (("", "topk"), "The prompt is empty: say what to show."),
        (("a", "topk", "7", "", ""), "On the right: keep is the share of key blocks kept"),
        (("a", "topk", "", "5000x256", ""), "Width is a whole number from 16 to 1280"),
    ):
        with pytest.raises(gradio.Error, match=words):
            answers(asks(client.desk, *form))
    monkeypatch.setattr(desk, "told", lambda studio, ask: {"refused": f"no {ask.what.prompt}"})
    with pytest.raises(gradio.Error, match="No quokka."):
        answers(asks(client.desk, "quokka"))
    assert client.post("/jobs", json={**FORM, "prompt": "quokka"}).json()["error"] == "No quokka."


def test_each_address_has_its_own_places_and_who_leaves_ends_its_run(pipe, tmp_path):
    full = Desk(small_studio(pipe), tmp_path, Limits(places=1, queue=8))  # serves nobody
    calls = [asks(full, FORM["prompt"], address=name) for name in ("10.0.0.1", "10.0.0.2")]
    another = asks(full, FORM["prompt"], address="10.0.0.1")

    async def wait():
        for call, words in zip(calls, ("Waiting for the machine.", "1 run is before"), strict=True):
            assert (await anext(call))[2].startswith(words)
        with pytest.raises(gradio.Error, match="1 of your runs are waiting already"):
            await anext(another)
        for call in calls:
            await call.aclose()

    asyncio.run(wait())
    assert not full._queue and {job.state for job in full._jobs.values()} == {"cancelled"}


def test_scripts_ask_through_gradio_client(pipe, tmp_path):
    from gradio_client import Client

    small = Desk(small_studio(pipe), tmp_path / "jobs")
    with served(server.build(small)) as address:
        client = Client(address, verbose=False, download_files=str(tmp_path / "got"))
        asked = {"size": "64x64", "steps": "1", "api_name": "/compare"}
        left, right, said, table = client.predict(FORM["prompt"], "topk", 3, **asked)
        (job,) = small._jobs.values()
        assert job.client == "127.0.0.1" and job.asked["seed"] == 3
        long = client.submit(FORM["prompt"], steps="100", size="256x256", api_name="/compare")
        while len(small._jobs) < 2 or list(small._jobs.values())[1].state == "waiting":
            time.sleep(0.05)
        long.cancel()
        while not (last := list(small._jobs.values())[1]).over:
            time.sleep(0.05)
        assert last.state == "cancelled"
    clips = [Path(x["video"] if isinstance(x, dict) else x) for x in (left, right)]
    assert all(clip.stat().st_size > 0 for clip in clips) and said == NONE_SKIPPED
    assert table["headers"] == ["", "left", "right", "right to left"] and len(table["data"]) > 5
