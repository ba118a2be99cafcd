"""The server without a browser: routes, refusals, headers, bad requests; the command line."""

import json
import time

import pytest
from asks import FORM, small_studio
from starlette.testclient import TestClient

from dit_accel.app import examples, server
from dit_accel.app.ask import Limits
from dit_accel.app.desk import Desk
from dit_accel.app.launch import warning
from dit_accel.cli.app import PageOptions


def finished(client, form=FORM) -> dict:
    job = client.post("/jobs", json=form).json()["job"]
    for _ in range(2400):
        found = client.get(f"/jobs/{job}").json()
        if found["state"] not in ("waiting", "running"):
            return {"job": job, **found}
        time.sleep(0.05)
    raise AssertionError("the run does not end")


def test_a_run_from_its_form_to_its_files(client):
    with client.stream("GET", f"/jobs/{finished(client)['job']}/events") as stream:
        last = json.loads([line for line in stream.iter_lines() if line][-1].removeprefix("data: "))
    assert last["state"] == "done" and last["value"]["frames"] == 9
    found = finished(client)
    assert found["asked"] == FORM and found["headline"] in found["html"].replace("&#39;", "'")
    for file in ("left.mp4", "comparison.json", "right.py"):
        assert client.get(f"/jobs/{found['job']}/files/{file}").status_code == 200
    report = client.get(f"/jobs/{found['job']}/files/report.html")
    assert "sandbox" in report.headers["content-security-policy"]
    sides = f"left={found['job']}:left&right={found['job']}:left"
    assert "identical" in client.get(f"/pairs?{sides}").json()["headline"]


def test_what_a_run_costs_is_told_before_and_a_word_it_does_not_know(client):
    told = client.post("/estimate", json=FORM).json()
    assert told["text"].startswith("192 tokens × 2 steps: about ") and not told["short"]
    assert "on this CPU" in told["text"]
    short = {**FORM, "right": {"method": "topk"}}
    assert "fewer than 512" in client.post("/estimate", json=short).json()["short"]
    odd = client.post("/estimate", json={**FORM, "prompt": "a zeppelin"}).json()
    assert "zeppelin" in odd["refused"] + " ".join(odd["notes"])
    assert client.get("/models").json()["draws"]


BAD_FORMS = [
    *(
        {**FORM, name: value}
        for name in ("steps", "frames", "seed", "size", "guidance", "fps")
        for value in ("x", "-1", "1e99", "9" * 5000)
    ),
    *({**FORM, "right": {"method": value}} for value in ("magic", "topk:insane", "../x", 7, [1])),
    *({**FORM, "right": {"method": "topk", "keep": value}} for value in ("0", "2", "nan", True)),
    {**FORM, "prompt": ""},
    {**FORM, "prompt": "x" * 501},
    {**FORM, "prompt": ["a"]},
    {**FORM, "prompt": "\ud800"},
    {**FORM, "image": "../../etc/passwd"},
    {**FORM, "right": {"method": "opened:../../etc/passwd"}},
    {**FORM, "left": "dense"},
    {**FORM, "model": 3},
    {**FORM, "colour": "red"},
    {**FORM, "size": "1280x1280", "frames": "129", "steps": "100"},
    [],
    "form",
    None,
]


@pytest.mark.parametrize("form", BAD_FORMS, ids=range(len(BAD_FORMS)))
def test_a_bad_form_is_refused_in_one_sentence(client, form):
    for route in ("/jobs", "/estimate"):
        answer = client.post(route, content=json.dumps(form))
        error = answer.json()["error"]
        assert answer.status_code == 400, error
        assert error[0].isupper() and error.endswith(".") and len(error) < 400
        assert "Traceback" not in error and "server's log" not in error


BAD_REQUESTS = [
    ("GET", "/examples/../../etc/passwd/files/x", {}, (404,)),
    ("GET", "/examples/rocket/files/..%2f..%2f..%2fpyproject.toml", {}, (404,)),
    ("GET", "/static/..%2fserver.py", {}, (404,)),
    ("GET", "/static/server.py", {}, (404,)),
    ("GET", "/jobs/" + "0" * 32, {}, (404,)),
    ("DELETE", "/jobs/nothing", {}, (404,)),
    ("GET", "/jobs/nothing/events", {}, (404,)),
    ("GET", "/jobs/nothing/files/left.mp4", {}, (404,)),
    ("GET", "/pairs?left=a&right=b", {}, (404,)),
    ("GET", "/pairs", {}, (404,)),
    ("POST", "/jobs", {"content": b"{"}, (400,)),
    ("POST", "/jobs", {"content": b"[" * 50_000}, (400,)),
    ("POST", "/jobs", {"content": b"x" * 100_000}, (400,)),
    ("POST", "/sent/picture", {"content": b"x" * (13 * 2**20)}, (413,)),
    ("POST", "/sent/picture", {"content": b"MZ" * 1000}, (400,)),
    ("POST", "/sent/preset", {"content": b"{}" * 40_000}, (413,)),
    ("POST", "/sent/preset", {"content": b'{"method": {"name": "/etc/passwd"}}'}, (400,)),
    ("POST", "/sent/script", {"content": b"x"}, (404,)),
    ("PUT", "/jobs", {"content": b"{}"}, (405,)),
    ("POST", "/", {"content": b"{}"}, (405,)),
    ("GET", "/gradio_api/upload", {}, (404,)),
    ("POST", "/gradio_api/queue/join", {"content": b"x" * 100_000}, (413,)),
    ("GET", "/gradio_api/file=/etc/passwd", {}, (403, 404)),
    ("GET", "/", {"headers": {"host": "evil.example"}}, (400,)),
    ("GET", "/", {"headers": {"host": "127.0.0.1.evil.example:7860"}}, (400,)),
    ("POST", "/jobs", {"json": FORM, "headers": {"origin": "http://evil.example"}}, (403,)),
    ("DELETE", "/jobs/x", {"headers": {"origin": "null"}}, (403,)),
]


@pytest.mark.parametrize(("method", "path", "extra", "statuses"), BAD_REQUESTS)
def test_a_bad_request_is_refused_and_leaves_the_page_alive(client, method, path, extra, statuses):
    answer = client.request(method, path, **extra)
    assert answer.status_code in statuses, answer.text
    assert "root:" not in answer.text and "Traceback" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/").status_code == 200


def test_the_page_calls_nobody_else_and_shows_no_paths(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-frame-options"] == "DENY"
    texts = [answer.text, *(client.get(f"/static/{n}").text for n in server._static_names())]
    for text in texts:
        plain = text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in plain and "https://" not in plain
        assert str(client.desk.folder) not in text and str(examples.FOLDER) not in text
    assert "style=" not in answer.text  # the policy would drop it


def test_scripts_are_fetched_again_only_where_they_changed(client):
    first = client.get("/static/page.js")
    same = client.get("/static/page.js", headers={"if-none-match": first.headers["etag"]})
    assert (first.status_code, same.status_code, same.text) == (200, 304, "")


def test_names_that_the_page_is_called_by(pipe, tmp_path):
    desk = Desk(small_studio(pipe), tmp_path)
    with TestClient(server.build(desk, hosts=("demo.example",))) as client:
        for host in ("demo.example", "localhost:7860", "127.0.0.1", "[::1]:7860", "10.0.0.7"):
            assert client.get("/", headers={"host": host}).status_code == 200
        assert client.get("/", headers={"host": "other.example"}).status_code == 400


def test_what_the_options_allow():
    bounds = PageOptions(public=True, model=["a/b"], queue=3).limits()
    assert bounds.public and bounds.models == ("a/b",) and bounds.queue == 3
    assert bounds.side == Limits.for_public().side and PageOptions().limits() == Limits()
    assert PageOptions().host == "127.0.0.1"
    assert Limits().on("cuda").work > Limits().on("cpu").work


def test_a_page_that_others_reach_is_warned_of_without_public():
    assert "add --public" in warning("0.0.0.0", Limits())
    for host, limits in (
        ("127.0.0.1", Limits()),
        ("::1", Limits()),
        ("localhost", Limits()),
        ("0.0.0.0", Limits.for_public()),
    ):
        assert warning(host, limits) == ""
