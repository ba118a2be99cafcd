"""The same manifest on a Ray cluster: a worker killed, all jobs done exactly once."""

import os
import signal
import sys
import threading
import time

import pytest
from tiny import saved_tiny_wan

from dit_accel.batch import Settings, run
from dit_accel.batch.manifest import Manifest
from dit_accel.media import owner as owners

SMALL = {"steps": 2, "height": 32, "width": 32, "frames": 5, "method": "dense"}


@pytest.fixture
def model(tmp_path):
    return saved_tiny_wan(tmp_path / "wan")


def kill_one(out, killed):
    """SIGKILL to the first worker that is at work, once three clips are there."""
    while not killed:
        time.sleep(0.05)
        if len(list(out.glob("*.mp4"))) < 3:
            continue
        rows = Manifest(out).ask("SELECT owner FROM jobs WHERE state = 'running'")
        if rows:
            os.kill(owners.pid_of(rows[0]["owner"]), signal.SIGKILL)
            killed.append(rows[0]["owner"])


@pytest.mark.slow
def test_a_worker_killed_on_a_cluster_costs_no_job(model, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, killed = tmp_path / "out", []
    killer = threading.Thread(target=kill_one, args=(out, killed), daemon=True)
    killer.start()
    jobs = [{"prompt": ["a cat", "a dog"], "seed": list(range(20))}]
    settings = Settings(model=str(model), retries=0)
    summary = run(jobs, out, defaults=SMALL, settings=settings, ray="local", workers=2, show="none")
    assert killed and summary.ok and summary.done == 40
    manifest = Manifest(out)
    done = manifest.ask("SELECT job, COUNT(*) AS n FROM events WHERE kind = 'done' GROUP BY job")
    assert len(done) == 40 and {row["n"] for row in done} == {1}
    assert len(list(out.glob("*.mp4"))) == 40 and not list(out.glob(".*.part.*"))
    ready = {row["owner"] for row in manifest.ask("SELECT owner FROM events WHERE kind = 'ready'")}
    assert len(ready) == 3  # two, and one in the place of the dead
    said = [row["text"] for row in manifest.ask("SELECT text FROM events WHERE kind = 'worker'")]
    assert len(said) == 1 and "its worker died" in said[0]


@pytest.mark.slow
def test_a_model_that_cannot_be_had_ends_the_run(model, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (model / "transformer" / "config.json").unlink()
    settings = Settings(model=str(model))
    out = tmp_path / "out"
    summary = run(
        [{"prompt": "a"}], out, defaults=SMALL, settings=settings, ray="local", show="none"
    )
    assert summary.done == 0 and "cannot be loaded" in summary.stopped


def test_without_ray_it_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    settings = Settings(model=str(model))
    with pytest.raises(ValueError, match="pip install ray"):
        run([{"prompt": "a"}], tmp_path / "out", settings=settings, ray="auto", show="none")
    with pytest.raises(ValueError, match="the cluster says where"):
        run([{"prompt": "a"}], tmp_path / "out", ray="auto", gpus="all", show="none")
