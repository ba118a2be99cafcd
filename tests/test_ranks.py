"""--ulysses: the commands as several processes, equal to one, and started anew when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import saved_tiny_wan

from dit_accel.batch import Settings, campaign, run, together
from dit_accel.batch.manifest import Manifest
from dit_accel.cli import main as cli
from dit_accel.cli import session
from dit_accel.generation.loading import load_pipeline
from dit_accel.media import video
from dit_accel.parallel import launcher

GENERATION = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 3}
GENERATED = {"height": 128, "width": 128, "frames": 9, "steps": 3}
SPARSE = {"method": {"name": "topk", "keep": 0.3}, "schedule": {"warmup": 1}, "min_tokens": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION))


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    Path("topk.json").write_text(json.dumps(SPARSE))


def batch(model: str, out: str, *more: str) -> list[str]:
    return ["batch", "jobs.jsonl", "-o", out, "--model", model, "--device", "cpu", *more]


def test_two_processes_make_the_picture_of_one(model, capfd):
    arguments = ["generate", "a cat", "--model", model, "--method", "topk.json", "--frames", "1"]
    arguments += ["--device", "cpu", "--size", "256x256"]
    assert cli.run([*arguments, "-o", "one.png"]) == 0
    assert cli.run([*arguments, "-o", "two.png", "--ulysses", "2"]) == 0
    said = capfd.readouterr().out
    kept = [line for line in said.splitlines() if "of attention work kept" in line]
    assert len(kept) == 2 and kept[0] == kept[1] and "100.0%" not in kept[0]
    one, two = (np.asarray(Image.open(name)) for name in ("one.png", "two.png"))
    assert np.array_equal(one, two)  # the files differ in the command that they tell


@pytest.mark.parametrize(
    "words, why",
    [
        (("--kv", "all", "--ulysses", "2"), "kv is 'gather', 'ring' or None (Ulysses), not 'all'"),
        (("--kv", "ring"), "add how many with ulysses, or leave kv out"),
    ],
)
def test_a_way_of_keys_that_is_none(model, capsys, words, why):
    assert cli.run(["generate", "a cat", "--model", model, *words]) == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_pruned_tokens_are_shared_by_heads(model, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = ["--ulysses", "2", "--kv", "ring", "--prune", "0.5"]
    assert cli.run(["generate", "a cat", "--model", model, *both]) == 2
    assert "leave --kv or --prune out" in " ".join(capsys.readouterr().err.split())
    job = {"prompt": "a cat", "method": "topk", "prune": 0.5}
    with pytest.raises(ValueError, match="line 1 prunes tokens"):
        run([job], "out", ulysses=2, kv="gather", settings=Settings(model=model), show="none")


def test_every_command_says_how_its_processes_share(model, monkeypatch, capsys):
    """What two processes give by it is tested in test_ring.py."""
    said = []

    def share(pipe, count, **how):
        said.append((count, how))
        raise ValueError("seen")

    for module in (session, together):
        monkeypatch.setattr(module, "share", share)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = ["--model", model, "--device", "cpu", "--ulysses", "2", "--kv", "ring"]
    for command in (["generate", "a cat"], ["compare", "a cat", "-o", "pair"]):
        assert cli.run([*command, *two]) == 2
    monkeypatch.setattr(campaign, "launched", lambda: nullcontext(0))
    Path("jobs.jsonl").write_text('{"prompt": "a cat"}\n')
    assert cli.run(["batch", "jobs.jsonl", "-o", "out", *two]) == 2
    assert said == [(2, {"kv": "ring", "anything": True})] * 3
    assert capsys.readouterr().err.count("seen") == 3


def test_a_batch_by_two_processes_makes_the_clips_of_one(model, capfd, forks):
    Path("jobs.jsonl").write_text(
        '{"prompt": "a cat", "seed": [1, 2], "method": "topk.json"}\n'
        '{"prompt": "a dog", "method": "dense"}\n'
    )
    same = [f"--{name}={value}" for name, value in (("frames", 9), ("steps", 3))]
    same.append("--size=128x128")
    pipe, _ = load_pipeline(model, "cpu")
    assert run("jobs.jsonl", "one", pipe=pipe, defaults=GENERATED, show="none").ok
    assert cli.run(batch(model, "two", "--ulysses", "2", "--check-every", "2", *same)) == 0
    assert "3 of 3 jobs done in two" in capfd.readouterr().out
    one, two = (
        sorted(p for p in Path(folder).glob("*.mp4") if not p.stem.endswith("dense"))
        for folder in ("one", "two")
    )
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 3
    for a, b in zip(one, two, strict=True):
        assert abs(video.read(a).astype(int) - video.read(b)).max() <= 2
    reports = [json.loads(line) for line in Path("two/results.jsonl").read_text().splitlines()]
    assert reports[0]["report"]["kept"] < 1 and reports[0]["report"]["unplanned"] == {}


def test_what_is_refused_is_said_once(model, capfd, forks):
    Path("jobs.jsonl").write_text('{"prompt": "a cat", "seeed": 1}\n')
    assert cli.run(batch(model, "out", "--ulysses", "2")) == 2
    said = capfd.readouterr().err
    assert said.count("did you mean 'seed'?") == 1 and "process 1" not in said


@pytest.mark.parametrize("count", ["0", "65"])
def test_an_impossible_number(model, capsys, count):
    assert cli.run(["generate", "a cat", "--model", model, "--ulysses", count]) == 2
    assert f"from 1 to 64, not {count}" in capsys.readouterr().err


def test_a_launcher_must_have_started_as_many(monkeypatch):
    with pytest.raises(launcher.Wanted):
        launcher.check(2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="ulysses is 2, but the launcher started 3"):
        launcher.check(2)
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        run([{"prompt": "a"}], "out", ulysses=2, show="none")
    with pytest.raises(ValueError, match="leave workers, gpus, ray out"):
        run([{"prompt": "a"}], "out", ulysses=2, workers=2, show="none")


def test_a_failure_of_another_process_is_told(monkeypatch, capfd):
    real = subprocess.Popen

    def popen(command, env, **options):
        code = "import os, sys, time; rank = os.environ['RANK']; print('hello', rank);"
        code += "sys.exit(5) if rank == '1' else time.sleep(60)"
        return real([sys.executable, "-c", code], env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    began = time.monotonic()
    assert launcher.launch(3, []) == 5
    assert "process 1 of 3 failed:\nhello 1" in capfd.readouterr().err
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_process_killed_on_the_way_costs_no_job(model):
    Path("jobs.jsonl").write_text(json.dumps({"prompt": "a cat", "seed": list(range(24))}) + "\n")
    command = [sys.executable, "-m", "dit_accel", *batch(model, "out", "--ulysses", "2")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not len(list(Path("out").glob("*.mp4"))) >= 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(child_of(process.pid, rank=1), signal.SIGKILL)
    assert process.wait(200) == 0
    manifest = Manifest("out")
    assert manifest.counts()["done"] == 24
    done = manifest.ask("SELECT job FROM events WHERE kind = 'done'")
    assert len(done) == len({row["job"] for row in done}) == 24
    assert manifest.ask("SELECT 1 FROM events WHERE kind IN ('retry', 'lost', 'released')")


def child_of(pid: int, rank: int) -> int:
    """The process that `pid` started with this rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"{pid} has no child of rank {rank}")
