"""Two worker processes on one queue, killed at random; the command line; a launcher."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import forked
import pytest
from tiny import saved_tiny_wan

from dit_accel.batch import Settings, places, run
from dit_accel.batch.manifest import Manifest
from dit_accel.media import owner as owners

SMALL = {"steps": 2, "height": 32, "width": 32, "frames": 5, "method": "dense"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("model") / "wan")


class Killer(threading.Thread):
    """Kills a worker that is at work with SIGKILL, at a random moment, `times` times."""

    def __init__(self, out, times):
        super().__init__(daemon=True)
        self.out, self.times, self.killed = out, times, []

    def run(self):
        chance = random.Random(0)
        while len(self.killed) < self.times:
            time.sleep(0.1)
            if not (self.out / "manifest.sqlite").exists():
                continue
            rows = Manifest(self.out).ask("SELECT owner FROM jobs WHERE state = 'running'")
            fresh = [r["owner"] for r in rows if r["owner"] not in self.killed]
            if fresh:
                time.sleep(chance.uniform(0, 0.3))
                os.kill(owners.pid_of(fresh[0]), signal.SIGKILL)
                self.killed.append(fresh[0])


def test_two_workers_one_killed_all_jobs_exactly_once(model, tmp_path, forks):
    killer = Killer(tmp_path, 1)
    killer.start()
    jobs = [{"prompt": ["a cat", "a dog"], "seed": list(range(20))}]
    settings = Settings(model=str(model), retries=0)
    summary = run(jobs, tmp_path, defaults=SMALL, settings=settings, workers=2, show="none")
    assert summary.ok and summary.done == 40
    manifest = Manifest(tmp_path)
    done = manifest.ask("SELECT job, COUNT(*) AS n FROM events WHERE kind = 'done' GROUP BY job")
    assert len(done) == 40 and {row["n"] for row in done} == {1}
    assert len(list(tmp_path.glob("*.mp4"))) == 40
    assert not list(tmp_path.glob(".*.part.*"))
    assert len(killer.killed) == 1
    [told] = manifest.ask("SELECT text FROM events WHERE kind = 'worker'")
    assert "killed by SIGKILL" in told["text"]
    assert not manifest.ask("SELECT * FROM workers")


def test_the_command_is_killed_and_goes_on(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "dit_accel.batch", str(prompts), "-o", str(out), "--json"),
        *("--model", str(model), "--size", "32x32", "--frames", "5", "--steps", "2"),
        *(word for n in range(10) for word in ("--seed", str(n))),
    ]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # a clip is there a moment before the manifest says so
    while not (list(out.glob("*.mp4")) and Manifest(out).counts()["done"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    made = Manifest(out).counts()["done"]
    ended = forked.run(command)  # the first was a process as ever
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert lines[-1]["event"] == "summary" and lines[-1]["done"] == 20
    assert sum(line["event"] == "done" for line in lines) <= 20 - made
    assert made >= 1
    events = Manifest(out).ask("SELECT job FROM events WHERE kind = 'done'")
    assert len(events) == len({row["job"] for row in events}) == 20


def test_processes_of_a_launcher_share_the_queue(model, tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text(json.dumps({**SMALL, "prompt": ["a cat", "a dog"], "seed": list(range(8))}))
    out = tmp_path / "out"
    command = [
        # what `accelerate launch` runs for several GPUs; for CPUs it wants MPI
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("-m", "dit_accel.batch", str(path), "-o", str(out), "--model", str(model)),
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("16 of 16 jobs done") == 1
    manifest = Manifest(out)
    assert len(manifest.ask("SELECT DISTINCT owner FROM events WHERE kind = 'ready'")) == 2
    done = manifest.ask("SELECT job FROM events WHERE kind = 'done'")
    assert len(done) == len({row["job"] for row in done}) == 16


def test_the_command_refuses_bad_lines_at_once(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "a cat"}\n{"prompt": "a cat", "step": 3}\n')
    command = [sys.executable, "-m", "dit_accel.batch", str(path), "-o", str(tmp_path / "out")]
    ended = forked.run(command)
    assert ended.returncode == 2
    assert "line 2: unknown key 'step': did you mean 'steps'?" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_workers_share_the_cores(device):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert places._threads([device]) == 0
    assert places._threads([device] * 2) == max(1, cores // 2)
    assert places._threads([device] * 1000) == 1
