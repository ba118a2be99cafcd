"""The form, the server without a browser, the command line."""

import json
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from asks import DEFAULTS, SPARSE

from dit_accel.app import server
from dit_accel.app.ask import Limits, Side
from dit_accel.app.desk import Desk
from dit_accel.app.form import Form
from dit_accel.app.page import build
from dit_accel.app.studio import Studio
from dit_accel.cli.app import PageOptions


def test_the_form_makes_the_request_it_shows(studio, tmp_path):
    tiles = Side("rettention:fast", keep=0.05, warmup=0.2, order="tile")
    for sides in ((Side(), tiles), (Side(prune="safe"), replace(SPARSE, prune="fast"))):
        values = Form.values("a cat", sides, 3, 12, (64, 32, 9))
        ask = Form.ask(*values, limits=Limits())
        assert (ask.left, ask.right) == sides
    assert (ask.seed, ask.steps, ask.width, ask.height, ask.frames) == (3, 12, 64, 32, 9)
    demo = build(Desk(studio, tmp_path), Limits())
    assert len(demo.fns) > 0
    assert all(fn.api_visibility == "private" for fn in demo.fns.values() if fn.api_name)


@pytest.fixture(scope="module")
def address(pipe, tmp_path_factory):
    jobs = tmp_path_factory.mktemp("jobs")
    (jobs / "clip.txt").write_text("here")
    demo = build(Desk(Studio(lambda name: (pipe, DEFAULTS)), jobs), Limits.for_public())
    _, url, _ = demo.launch(
        server_name="127.0.0.1",
        prevent_thread_lock=True,
        **server.settings(jobs),
    )
    yield url, jobs
    demo.close()


def fetch(url: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_the_server_serves_its_own_files_and_no_others(address):
    url, jobs = address
    assert fetch(f"{url}gradio_api/file={jobs}/clip.txt") == (200, "here")
    for path in ("/etc/passwd", f"{jobs}/../../etc/passwd", str(Path(__file__).resolve())):
        assert fetch(f"{url}gradio_api/file={path}")[0] in (403, 404)


def test_the_page_calls_nobody_else(address):
    url, _ = address
    status, page = fetch(url)
    assert status == 200
    for word in ("googleapis", "gstatic", "cdnjs", "api.gradio.app"):
        assert word not in page
    config = json.loads(fetch(f"{url}config")[1])
    assert config["analytics_enabled"] is False


def test_what_the_options_allow():
    bounds = PageOptions(public=True, model=["a/b"], queue=3).limits()
    assert bounds.public and bounds.models == ("a/b",) and bounds.queue == 3
    assert bounds.side == Limits.for_public().side and PageOptions().limits() == Limits()
    assert PageOptions().host == "127.0.0.1"
