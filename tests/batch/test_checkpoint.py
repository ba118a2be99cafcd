"""A batch over a checkpoint: told to the run or by the jobs, the same in all of them."""

import json

import pytest
from small_batches import go

from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import Manifest
from dit_accel.cli import main as cli
from dit_accel.media import metadata


@pytest.mark.parametrize("told", ["option", "defaults"])
def test_jobs_run_as_it_was_trained(turbowan, tmp_path, told, forks):
    model, path = map(str, turbowan)
    lines = [{"prompt": "a cat", "name": "trained"}]
    lines.append({"prompt": "a cat", "method": "dense", "name": "dense"})
    lines.append({"prompt": "a cat", "sampler": "flow:5", "name": "flow"})
    option = ["--checkpoint", path] if told == "option" else []
    if not option:
        lines.insert(0, {"defaults": {"checkpoint": turbowan[1].name}})
    jobs = turbowan[1].with_name(f"{told}.jsonl")
    jobs.write_text("\n".join(map(json.dumps, lines)))
    run = ["batch", str(jobs), "-o", str(tmp_path), "--model", model, "--json"]
    assert cli.run([*run, *option]) == 0
    facts = {name: metadata.read(tmp_path / f"{name}.mp4") for name in ("trained", "dense", "flow")}
    assert [f["method"] for f in facts.values()] == ["sla", "dense", "sla"]
    assert {f["checkpoint"]["family"] for f in facts.values()} == {"TurboWan"}
    assert {f["arguments"]["num_inference_steps"] for f in facts.values()} == {4}
    assert facts["flow"]["sampler"] == "flow:5" and facts["trained"]["sampler"] is None
    manifest = Manifest(tmp_path)
    assert manifest.get("settings")["checkpoint"] == [path]
    stored = [json.loads(row["job"]) for row in manifest.ask("SELECT job FROM jobs")]
    assert {job["checkpoint"] for job in stored} == {path}
    manifest.close()


def test_what_cannot_be(turbowan, tmp_path, pipe, capsys):
    model, path = map(str, turbowan)
    run = ["batch", "-o", str(tmp_path / "out"), "--model", model]
    jobs = tmp_path / "jobs.jsonl"
    for lines, says in (
        ([{"prompt": "a", "checkpoint": path}, {"prompt": "b"}], "a batch runs one"),
        ([{"prompt": "a", "checkpoint": "none.pth"}], "there is no checkpoint none.pth"),
        ([{"prompt": "a", "method": "trained"}], "'trained' is a checkpoint's, and there is none"),
    ):
        jobs.write_text("\n".join(map(json.dumps, lines)))
        assert cli.run([*run[:1], str(jobs), *run[1:]]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"load_checkpoint\(pipe, …\) before"):
        go(pipe, tmp_path / "out", [{"prompt": "a", "checkpoint": path}])


def test_ids_of_jobs_without_one_are_what_they_were():
    assert Job("a cat").id == Job("a cat", checkpoint=None).id
    assert Job("a cat").to_dict() == {"prompt": "a cat", "seed": 0, "method": "shared"}
