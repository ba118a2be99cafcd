"""The faults that the page once had: each has its tests, and what can be shown without a browser is
shown to fail again once its mending is taken away.

| | what was wrong |
|---|---|
| P1 | a number out of range: nothing runs and nothing is said |
| P2 | examples and form disagree |
| P3 | "1.28× slower" of clips in which nothing was skipped |
| P4 | a run of hours, which goes on without its tab |
| P5 | nothing says what the model draws, and which words it does not know |
| P6 | a reload or a lost server loses the run; a chip mixes two |
| P7 | on a phone, Generate shows no effect |
| P8 | a full disk loses the clip; a mistyped model evicts the loaded one |
| P9 | words and map disagree |
| P10 | neither time nor place in the queue are told |
| P11 | wipe and difference hide which side is which |
| P12 | focus, names, contrast, sizes of targets |
| S1 | a page that others reach warns of nothing |
| S2 | the Host header is not looked at |
| S3 | files can be uploaded |
| S4 | no policy for content, types and frames |
| S5 | one client takes all places |
| S6 | addresses show paths of the server |
"""

import ast
import re
from pathlib import Path

import pytest
from asks import ASK, FORM, other, small_studio

from dit_accel.app import ask, examples, form, guard, launch, studio, views
from dit_accel.app.ask import BadField, Limits
from dit_accel.app.catalog import Words
from dit_accel.app.desk import Desk, Full, Job
from dit_accel.app.stop import Leash
from dit_accel.pages import figures

TESTS = Path(__file__).parents[1]
WHERE = {  # fault → tests of it, a file and the beginning of names
    "P1": ("page/test_form.py", "test_p1_"),
    "P2": ("page/test_form.py", "test_p2_"),
    "P3": ("page/test_run.py", "test_p3_"),
    "P4": ("page/test_run.py", "test_p4_"),
    "P5": ("page/test_form.py", "test_p5_"),
    "P6": ("page/test_run.py", "test_p6_"),
    "P7": ("page/test_run.py", "test_p7_"),
    "P8": ("app/test_desk.py", "test_a_full_disk_keeps"),
    "P9": ("page/test_looking.py", "test_p9_"),
    "P10": ("page/test_run.py", "test_p10_"),
    "P11": ("page/test_looking.py", "test_p11_"),
    "P12": ("page/test_looking.py", "test_p12_"),
    "S1": ("app/test_server.py", "test_a_page_that_others_reach"),
    "S2": ("app/test_server.py", "test_names_that_the_page_is_called_by"),
    "S3": ("app/test_gradio.py", "test_the_form_is_served_and"),
    "S4": ("app/test_server.py", "test_the_page_calls_nobody_else"),
    "S5": ("app/test_gradio.py", "test_each_address_has_its_own_places"),
    "S6": ("app/test_desk.py", "test_the_desk_writes_only_in_its_folder"),
}


def test_every_fault_has_its_test():
    named = re.findall(r"^\| ([PS]\d+) \|", __doc__, re.M)
    assert list(WHERE) == named and len(named) == 18
    for file, name in WHERE.values():
        tree = ast.parse((TESTS / file).read_text("utf-8"))
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert any(found.startswith(name) for found in functions), (file, name)


@pytest.fixture
def small(pipe, tmp_path):
    """A desk that serves nobody: whoever asks waits."""
    return Desk(small_studio(pipe), tmp_path / "jobs", Limits(queue=8, places=2))


def p1(client, small):
    with pytest.raises(BadField, match="Width is a whole number from 16 to 1280"):
        other(ASK, size="5000x16")


def p2(client, small):
    for record in examples.stored().values():
        method = form.read(record["asked"], Limits(), opened=None).right.config().method
        words = "dense" if method.name == "dense" else f"keep {method.keep:g}"
        assert words in record["right"]["label"]


def p3(client, small):
    record = next(x for x in examples.stored().values() if x["right"]["report"])
    report = {**record["right"]["report"], "kept": 1.0, "steps": []}
    dense = {**record, "right": {**record["right"], "report": report, "skips": False}}
    assert views.headline(dense).startswith("no attention skipped")


def p4_work(client, small):
    with pytest.raises(BadField, match="this page takes 500,000"):
        small.submit(other(ASK, size="1280x1280", frames=129, steps=100), {}, "ann")


def p4_tab(client, small):
    assert Leash(grace=-1).is_set()


def p5(client, small):
    told = client.post("/estimate", json={**FORM, "prompt": "a zeppelin"}).json()
    assert "zeppelin" in told["refused"] + " ".join(told["notes"])


def p8(client, small):
    small.studio.find = lambda name: 1 / 0 if name else None
    before = small.studio._loaded
    with pytest.raises(ZeroDivisionError):
        small.studio._model(("mistyped", ()), lambda item: None)
    assert small.studio._loaded is before


def p9(client, small):
    words = figures.full_steps([[1, 1], [1, 1], [0.25, 0.5], [None, 1]])
    assert words.startswith("All blocks were read in 3 of 4 steps")


def p10(client, small):
    first, second = (small.submit(ASK, {}, name) for name in ("ann", "bob"))
    said = small.news(second)["said"]
    assert re.match(r"1 run is before yours: your turn in about \d+", said)


def s1(client, small):
    assert "add --public" in launch.warning("0.0.0.0", Limits())


def s2(client, small):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def s3(client, small):
    answer = client.post("/gradio_api/upload", files={"files": ("x.txt", b"x")})
    assert answer.status_code == 404


def s4(client, small):
    headers = client.get("/").headers
    assert "default-src 'none'" in headers.get("content-security-policy", "")
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"


def s5(client, small):
    small.submit(ASK, {}, "ann")
    small.submit(ASK, {}, "ann")
    with pytest.raises(Full):
        small.submit(ASK, {}, "ann")


def s6(client, small):
    job = small.submit(ASK, {}, "ann")
    assert str(small.folder) not in job.base


def _loaded_first(patch, small):
    """The loaded model is let go before the next one is looked for."""
    from dit_accel.app.studio import Studio

    model = Studio._model
    patch.setattr(
        Studio, "_model", lambda self, *a: (setattr(self, "_loaded", None), model(self, *a))
    )


def _old_keeps(patch, small):
    records = examples.stored()
    for record in records.values():
        record["asked"] = {**record["asked"], "right": {"method": "topk", "keep": "0.05"}}
    patch.setattr(examples, "stored", lambda: records)


CHECKS = [  # a check, and its mending taken away
    (p1, lambda patch, small: patch.setattr(ask.Ask, "_within", staticmethod(lambda *a: None))),
    (p2, _old_keeps),
    (p3, lambda patch, small: patch.setattr(views, "skipped", lambda data: True)),
    (p4_work, lambda patch, small: patch.setattr(studio, "check_work", lambda *a: None)),
    (p4_tab, lambda patch, small: patch.setattr(Leash, "is_set", lambda self: False)),
    (p5, lambda patch, small: patch.setattr(Words, "trouble", lambda self, prompt: None)),
    (p8, _loaded_first),
    (p9, lambda patch, small: patch.setattr(figures, "full_steps", lambda cells: "340 ran sparse")),
    (p10, lambda patch, small: patch.setattr(Desk, "place", lambda self, job: (0, 0.0))),
    (s1, lambda patch, small: patch.setattr(launch, "_loopback", lambda host: True)),
    (s2, lambda patch, small: patch.setattr(guard.Guard, "knows", lambda self, host: True)),
    (s3, lambda patch, small: patch.setattr(guard.Guard, "_door", lambda self, path: True)),
    (s4, lambda patch, small: patch.setattr(guard, "HEADERS", {})),
    (s5, lambda patch, small: patch.setattr(small, "limits", Limits(queue=8, places=8))),
    (s6, lambda patch, small: patch.setattr(Job, "base", property(lambda job: str(job.folder)))),
]


@pytest.mark.parametrize(("check", "away"), CHECKS, ids=[check.__name__ for check, _ in CHECKS])
def test_it_is_mended_and_the_check_fails_without_the_mending(client, small, check, away):
    check(client, small)
    for job in list(small._queue):
        small.cancel(job)
    with pytest.MonkeyPatch.context() as patch:
        away(patch, small)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(client, small)
