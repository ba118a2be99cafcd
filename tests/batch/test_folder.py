"""Whose folder it is: one run at a time, nobody's file replaced, no trace of what is refused."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import forked
import pytest
from small_batches import SMALL, files, go
from tiny import saved_tiny_wan

from dit_accel.batch import Settings
from dit_accel.batch.books import SCHEMA, VERSION
from dit_accel.batch.folder import Hold, clashes
from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import Manifest
from dit_accel.cli import main as cli
from dit_accel.media import metadata
from dit_accel.media import owner as owners

ELSEWHERE = "another-host/boot/pid:1:2"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture
def somebody():
    """The name of a process that lives until the test is over."""
    code = "from dit_accel.media.owner import me; print(me(), flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    yield process.stdout.readline().strip()
    process.communicate("\n")


def test_another_batch_is_refused_while_one_runs(pipe, tmp_path, somebody):
    manifest = Manifest(tmp_path)
    manifest.plan([(1, Job("a dog"))])
    manifest.enter("theirs", somebody, "their jobs")
    told = f"in use by another batch, process {owners.pid_of(somebody)} on"
    with pytest.raises(ValueError, match=told):
        go(pipe, tmp_path, [{"prompt": "a cat"}])
    assert manifest.counts()["waiting"] == 1 and not files(tmp_path)


def test_a_run_that_died_holds_nothing(pipe, tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "from dit_accel.media.owner import me; print(me())"],
        capture_output=True,
        text=True,
    )
    manifest = Manifest(tmp_path, lease=0.0)
    manifest.enter("dead", dead.stdout.strip(), "other jobs")
    manifest.enter("silent", ELSEWHERE, "other jobs")  # on another host, not heard of
    manifest.close()
    time.sleep(0.01)
    with Hold(Manifest(tmp_path, lease=0.0), "jobs"):
        assert [row["asked"] for row in Manifest(tmp_path).ask("SELECT * FROM runs")] == ["jobs"]
    assert not Manifest(tmp_path).ask("SELECT * FROM runs")
    assert go(pipe, tmp_path, [{"prompt": "a cat"}]).ok


def test_the_same_run_may_join_in(tmp_path, somebody):
    manifest = Manifest(tmp_path)
    manifest.enter("theirs", somebody, "jobs")
    with Hold(manifest, "jobs"):
        assert len(manifest.ask("SELECT * FROM runs")) == 2
    assert len(manifest.ask("SELECT * FROM runs")) == 1


def test_two_runs_on_one_folder_lose_nothing(model, tmp_path):
    """Of two that ask for different clips one is refused; the other's are all made, once."""
    commands = []
    for name, prompt, count in (("a", "a cat", 12), ("b", "a dog", 3)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({**SMALL, "prompt": prompt, "seed": list(range(count))}))
        command = [sys.executable, "-m", "dit_accel.batch", str(path), "-o", str(tmp_path / "two")]
        commands.append([*command, "--model", str(model)])
    first = forked.Popen(commands[0], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((tmp_path / "two").glob("*.mp4")):
        assert time.monotonic() < until
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # so that it is still there however slow the second starts
    second = forked.run(commands[1])
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2 and "in use by another batch" in second.stderr
    assert b"12 of 12 jobs done" in first.communicate()[0] and first.returncode == 0
    again = forked.run(commands[1])
    assert again.returncode == 0 and "3 of 3 jobs done" in again.stdout
    assert len(files(tmp_path / "two")) == 15
    done = Manifest(tmp_path / "two").ask("SELECT job FROM events WHERE kind = 'done'")
    assert len(done) == len({row["job"] for row in done}) == 15


def test_a_run_counts_what_it_asks_for(pipe, tmp_path):
    assert go(pipe, tmp_path, [{"prompt": "a cat", "seed": [1, 2]}]).done == 2
    summary = go(pipe, tmp_path, [{"prompt": "a dog"}])
    assert str(summary).startswith("1 of 1 jobs done") and len(files(tmp_path)) == 3
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 3 and (tmp_path / "index.html").read_text().count("<video") == 3


@pytest.mark.parametrize("name", ["index.html", "results.jsonl", "logs/worker-0.log"])
def test_pages_of_others_are_not_replaced(pipe, tmp_path, name):
    mine = tmp_path / "res" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"prompt": "a cat"}\n')
    jobs = mine if name == "results.jsonl" else [{"prompt": "a cat"}]
    with pytest.raises(ValueError, match=f"{mine.name} was not written by a batch"):
        go(pipe, tmp_path / "res", jobs)
    assert mine.read_text() == '{"prompt": "a cat"}\n'
    assert sorted(p.name for p in (tmp_path / "res").iterdir()) == [name.split("/")[0]]


def test_a_job_file_in_its_own_folder(pipe, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a cat"}\n')
    for _ in range(2):
        assert go(pipe, tmp_path, jobs).ok
    assert jobs.read_text() == '{"prompt": "a cat"}\n'


def test_clips_of_others_are_not_replaced(pipe, tmp_path):
    (tmp_path / "holiday.mp4").write_text("mine")
    jobs = [{"prompt": "a cat", "name": "Holiday"}, {"prompt": "a dog", "name": "dog.mp4"}]
    with pytest.raises(ValueError, match=r"line 1: holiday\.mp4 stands in .* and is not of this"):
        go(pipe, tmp_path, jobs)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.mp4"]
    for _ in range(2):  # our own is replaced when it is asked for again
        summary = go(pipe, tmp_path, jobs, Settings(keep_going=True))
        assert summary.done == 1 and [row["line"] for row in summary.refused] == [1]
    (tmp_path / "dog.mp4").unlink()
    assert go(pipe, tmp_path, jobs, Settings(keep_going=True)).done == 1
    assert files(tmp_path) == ["dog.mp4", "holiday.mp4"]
    assert (tmp_path / "holiday.mp4").read_text() == "mine"


def test_names_that_are_one_file_somewhere(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.plan([(1, Job("a", name="Été"))])
    [claim] = manifest.claim(owners.me())
    (tmp_path / "Été.mp4").write_bytes(b"clip")
    manifest.finish(claim, owners.me(), "Été.mp4", 1.0, {})
    [(line, why)] = clashes(manifest, [(4, Job("b", name="e\u0301te\u0301"))])
    assert line == 4 and "name of another clip" in why


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("猫" * 120, "name has 360 bytes: a file's has at most 240"),
        ("x.dense", "is a checked job's dense clip"),
        ("x.dense.mp4", "is a checked job's dense clip"),
        ("con", "is reserved"),
        ("AUX.clip", "is reserved"),
        ("clip.", "without folder and suffix"),
        ("clip ", "without folder and suffix"),
        ("a/b", "without folder and suffix"),
        ("", "without folder and suffix"),
    ],
)
def test_names_no_file_can_have(name, says):
    with pytest.raises(ValueError, match=says):
        Job("a cat", name=name)


def test_a_name_has_one_suffix():
    assert Job("a cat", name="clip.mp4").output == Job("a cat", name="clip").output == "clip"
    assert Job("a cat", name="v1.2").output == "v1.2"
    assert len(Job("猫" * 500, method="dense").output.encode()) < 100


def test_names_may_be_swapped(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.plan([(1, Job("a", name="x")), (2, Job("b", name="y"))])
    manifest.plan([(1, Job("a", name="y")), (2, Job("b", name="x"))])
    rows = manifest.ask("SELECT output FROM jobs ORDER BY number")
    assert [row["output"] for row in rows] == ["y", "x"]


def test_a_database_of_another_program(pipe, tmp_path):
    path = tmp_path / "manifest.sqlite"
    theirs = sqlite3.connect(path)
    theirs.execute("CREATE TABLE jobs (mine)")
    theirs.execute("PRAGMA user_version = 1")
    theirs.commit()
    theirs.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="the tables of another program"):
        go(pipe, tmp_path, [{"prompt": "a cat"}])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("make", ["mkdir", "dangling"])
def test_a_manifest_that_is_no_file(pipe, tmp_path, make):
    path = tmp_path / "out" / "manifest.sqlite"
    path.parent.mkdir()
    path.mkdir() if make == "mkdir" else path.symlink_to(tmp_path / "no" / "where")
    with pytest.raises(ValueError, match=r"manifest\.sqlite (cannot be|is no manifest)"):
        go(pipe, tmp_path / "out", [{"prompt": "a cat"}])


def test_the_manifest_of_the_first_release_goes_on(pipe, tmp_path):
    old = SCHEMA[: SCHEMA.index("CREATE TABLE IF NOT EXISTS runs")]
    old = old.replace(",\n  asked INTEGER NOT NULL DEFAULT 1", "")
    theirs = sqlite3.connect(tmp_path / "manifest.sqlite")
    theirs.executescript(f"{old} PRAGMA user_version = 1;")
    job = Job("a cat", **SMALL)
    theirs.execute(
        "INSERT INTO jobs (id, number, line, job, output, shape, checked, state, file, report,"
        " seconds) VALUES (?, 1, 1, ?, 'cat', '', 0, 'done', 'cat.mp4', ?, 1)",
        (job.id, json.dumps(job.to_dict()), '{"size": [5, 32, 32]}'),
    )
    theirs.commit()
    theirs.close()
    (tmp_path / "cat.mp4").write_text("clip")
    (tmp_path / "index.html").write_text("page")
    assert go(pipe, tmp_path, [{"prompt": ["a cat", "a dog"]}]).done == 2
    assert (tmp_path / "cat.mp4").read_text() == "clip"
    assert Manifest(tmp_path).ask("PRAGMA user_version")[0][0] == VERSION == 2


def test_one_line_that_cannot_be_read_costs_no_other(pipe, tmp_path):
    lines = [
        {"prompt": "a cat", "image": "n" * 300},
        {"prompt": "a cat", "image": str(tmp_path)},
        {"prompt": "a cat", "image": "a\0b"},
        {"prompt": "a cat", "method": "m" * 300 + ".json"},
        {"prompt": "a cat", "method": f"{tmp_path}/x.json"},
        {"prompt": "a cat"},
    ]
    (tmp_path / "x.json").mkdir()
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(["[" * 90_000, *map(json.dumps, lines)]))
    summary = go(pipe, tmp_path / "out", path, Settings(keep_going=True))
    assert summary.done == 1 and [row["line"] for row in summary.refused] == [1, 2, 3, 4, 5, 6]


def test_a_line_that_makes_too_many_jobs_is_refused_at_once(pipe, tmp_path):
    many = list(range(20_000))
    jobs = [{"prompt": "a", "seed": many, "steps": many, "frames": many}]
    with pytest.raises(ValueError, match=r"make 8000000000000 jobs"):
        go(pipe, tmp_path / "out", jobs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--frames", "6"], "frames is a multiple of 4"),
        (["--size", "0x0"], "height lies from 16"),
        (["--frames", "0"], "frames lies from 1"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--method", "topk:"], "no preset"),
        (["--timeout", "nan"], "timeout is a finite number"),
        (["--check-every", "-1"], "check_every is"),
        (["--model", "./none"], "there is no folder"),
        (["--device", "meta"], "holds no numbers"),
        (["--retries", "-1"], "retries is at least 0"),
    ],
)
def test_what_can_never_succeed_is_2_and_leaves_nothing(
    model, tmp_path, capsys, monkeypatch, arguments, says, forks
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n")
    run = ["batch", "p.txt", "-o", "deep/out", "--model", str(model), *arguments]
    assert cli.run(run) == 2
    out, err = capsys.readouterr()
    assert says in err and "Traceback" not in err and "go on" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_a_model_that_is_cut_off_is_2(model, tmp_path, capsys, forks):
    broken = shutil.copytree(model, tmp_path / "broken")
    [weights] = (broken / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "p.txt").write_text("a cat\n")
    run = ["batch", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), "--model", str(broken)]
    assert cli.run(run) == 2
    assert f"{weights} is cut off or damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_method_the_model_refuses_is_told_before_the_first_clip(pipe, tmp_path):
    preset = tmp_path / "deep.json"
    preset.write_text('{"method": {"name": "topk"}, "schedule": {"dense_layers": [99]}}')
    with pytest.raises(ValueError, match=r"the model refuses 1 job\(s\):\n  line 1: .*layer 99"):
        go(pipe, tmp_path / "out", [{"prompt": "a cat", "method": str(preset)}])


def test_clips_carry_what_they_were_made_from(pipe, tmp_path):
    jobs = [{"prompt": ["a [b] cat", "a dog"], "seed": 7, "method": "topk"}]
    assert go(pipe, tmp_path / "a", jobs, Settings(batch=2), check_every=2).ok
    found = [metadata.read(tmp_path / "a" / name) for name in files(tmp_path / "a")]
    assert [(f["prompt"], f["seed"]) for f in found] == [("a [b] cat", 7), *[("a dog", 7)] * 2]
    assert [f["method"] for f in found] == ["topk", "dense", "topk"]
    assert found[0]["arguments"]["height"] == 32 and found[0]["config"]["method"]["keep"]
    assert go(pipe, tmp_path / "b", jobs, Settings(metadata=False)).ok
    assert not any(metadata.read(tmp_path / "b" / name) for name in files(tmp_path / "b"))
