"""benchmarks/multi_gpu.py: its books, its starting anew; rehearsed with two processes (slow)."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import multi_gpu
import multi_gpu_batch as batch
import multi_gpu_cases as which
import multi_gpu_references as references
import multi_gpu_run

from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import Manifest
from dit_accel.bench.models import build
from dit_accel.generation.loading import load_pipeline
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate

SETTING = {"gpus": 2, "rounds": 1, "dry": True, "margin": 2.0}
FACTS = {"seconds": {"dense": 1.0}, "communicating": 0.1, "kept": None}
DONE = {"alone": FACTS, "together": FACTS, "error": 0.0, "bound": 1e-7, "equal": True}


def rehearse(out: Path, *more: str) -> dict:
    command = [sys.executable, multi_gpu.__file__, "--dry-run", "--rounds", "1", "--clips", "4"]
    subprocess.run([*command, "--out", str(out), *more], check=True, timeout=900)
    return json.loads(out.read_text())


def test_a_process_that_fails_costs_its_row_and_the_rest_is_started_anew(monkeypatch, tmp_path):
    names = [(case.name, row) for case in which.cases("joint", True) for row in case.rows]
    asked = []

    def launch(gpus, spec):
        asked.append([tuple(name) for name in spec["todo"]])
        for case, row in asked[-1]:
            yield {"case": case, "row": row}
            if (case, row) == names[2] and len(asked) == 1:
                yield "OutOfMemoryError: none left"
                return
            yield {"case": case, "row": row, **DONE}

    monkeypatch.setattr(multi_gpu, "launch", launch)
    record = multi_gpu.Record(tmp_path / "x.json", SETTING)
    multi_gpu.shared(record, "joint", 0)
    assert asked == [names, names[3:]]
    rows = {(row["case"], row["row"]): row for row in record.rows}
    assert list(rows) == names and rows[names[2]]["failed"] == "OutOfMemoryError: none left"
    assert [name for name, row in rows.items() if not multi_gpu.sound(row)] == [names[2]]
    # the same command again: what failed, and only that
    multi_gpu.shared(multi_gpu.Record(tmp_path / "x.json", SETTING), "joint", 0)
    assert asked[2:] == [[names[2]]]
    # only some rows
    multi_gpu.shared(multi_gpu.Record(tmp_path / "y.json", SETTING), "joint", 0, only=["sla@0.1"])
    assert asked[3] == [name for name in names if name[1] == "sla@0.1"]


def test_processes_that_never_start_are_not_started_again(monkeypatch, tmp_path):
    monkeypatch.setattr(multi_gpu, "launch", lambda gpus, spec: iter(["no NCCL"]))
    record = multi_gpu.Record(tmp_path / "x.json", SETTING)
    multi_gpu.shared(record, "ulysses", 0)
    assert {row["failed"] for row in record.rows} == {"no NCCL"}
    with pytest.raises(ValueError, match="another setting"):
        multi_gpu.Record(tmp_path / "x.json", {**SETTING, "gpus": 4})


@pytest.mark.parametrize("fault", ["equal", "exactly_once", "killed", "alone"])
def test_what_is_not_sound(fault):
    row = {"equal": True, "exactly_once": True, "killed": 1, "together": {"exactly_once": True}}
    assert multi_gpu.sound(row)
    assert not multi_gpu.sound({**row, fault: {"exactly_once": False} if fault == "alone" else 0})


def test_the_first_error_is_the_cause():
    said = "[rank1]: torch.OutOfMemoryError: CUDA\nx.ChildFailedError:\nRoot Cause\n exitcode : 1"
    assert multi_gpu._why(said) == "[rank1]: torch.OutOfMemoryError: CUDA"
    assert multi_gpu._why(said.partition("\n")[2]) == "exitcode : 1"


def test_jobs_are_counted_in_the_manifest(tmp_path):
    books = Manifest(tmp_path)
    books.plan([(1, Job("a cat")), (2, Job("a dog"))])
    with books._change() as db:
        for seq, (kind, job, owner) in enumerate(
            [("ready", None, "a"), ("done", "1", "a"), ("done", "2", "a"), ("done", "2", "b")]
        ):
            db.execute(
                "INSERT INTO events (time, kind, job, owner) VALUES (?, ?, ?, ?)",
                (10.0 + seq, kind, job, owner),
            )
        db.execute("UPDATE jobs SET state = 'done'")
    found = batch.judge(books, 2)
    assert found["done_twice"] == 1 and not found["exactly_once"]
    assert found["each_worker"] == [1, 2] and found["seconds"] == 3 and found["steady"] == 1
    assert (found["ready"], found["first"], found["last"]) == ([0.0], [1.0, 3.0], [2.0, 3.0])
    one = {"seconds": 20.0, "steady": 2.0}
    many = {"seconds": 11.0, "steady": 3.8}
    assert batch.compare(one, many, 2) == {"efficiency": 0.9091, "efficiency_steady": 0.95}


def test_the_first_cycle_and_the_watched_one_are_not_timed():
    run = multi_gpu_run.Run(("full", "sparse"), seconds=[90, 50, 4, 1, 6, 3, 80, 70])
    facts = run.facts(rounds=2, scale=2.0)
    assert facts["seconds"] == {"full": 10, "sparse": 4} and facts["spread"]["full"] == 4


def test_rounding_moves_every_linear_layer_by_half_a_unit():
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU())
    x = torch.randn(64, 8)
    plain = layers[0](x)
    with torch.no_grad(), multi_gpu_run.rounded_anew(layers):
        moved = layers[0](x)
    distance = ((moved - plain) / plain).abs().max()
    assert 0 < distance <= 1.01 * torch.finfo(torch.float32).eps
    assert torch.equal(layers[0](x), plain)


def test_the_large_folder_is_a_pipeline(monkeypatch, tmp_path):
    model = which.MODELS["wan1.3b-480p"]
    thin = {"num_layers": 1, "num_attention_heads": 1, "ffn_dim": 64}
    monkeypatch.setattr(batch, "MODELS", {model.name: replace(model, config=thin)})
    monkeypatch.setattr(batch, "CLIP", {**batch.CLIP, "height": 64, "width": 64, "num_frames": 5})
    pipe, known = load_pipeline(batch.wan_folder(tmp_path, torch.device("cpu")), "cpu")
    assert pipe.transformer.config.text_dim == pipe.text_encoder.config.d_model == 4096
    assert generate(pipe, known, Request("a cat", steps=1)).frames.shape == (5, 64, 64, 3)


def test_every_method_is_in_the_rows():
    from dit_accel import methods

    names = {row.partition("@")[0] for case in which.cases("joint", False) for row in case.rows}
    assert names == set(methods()) - {"dense"} | {"stock"}


def test_ways_are_compared_by_the_same_rows():
    found = {}
    for case in which.cases("ways", False):
        rows = found.setdefault(case.name, [])
        assert not set(case.rows) & set(rows)
        rows += case.rows
    assert list(found)[:3] == [f"wan14b-720p, {way}" for way in ("ulysses", "gather", "ring")]
    assert len(found) == 6
    ulysses, gather = found["hunyuan-720p, ulysses"], found["hunyuan-720p, gather"]
    assert set(found["hunyuan-720p, ring"]) < set(gather) < set(ulysses)
    for name in ulysses:
        which.course_of(name, 1)


def test_dear_rows_come_first():
    names = ["topk@0.1", "rettention@0.1", "stock+compile", "stock"]
    assert references.dearest_first(names) == [
        "rettention@0.1",
        "stock+compile",
        "stock",
        "topk@0.1",
    ]


def test_one_gpu_is_measured_once_by_one_process(tmp_path):
    case = which.cases("ways", True)[0]
    books, other = references.References(tmp_path / "x"), references.References(tmp_path / "x")
    books.begin()
    assert books.claim(case, "stock") and not other.claim(case, "stock")
    assert other.read(case, "stock") is None
    found = {"output": torch.arange(3.0), "kinds": ("dense",), "facts": {"peak_gib": None}}
    books.write(case, "stock", found)
    assert other.claim(case, "topk@0.1 budgets")
    other.write(case, "topk@0.1 budgets", {"failed": "out of memory"})
    books.begin()  # processes started anew: what failed is tried again, and nothing else
    assert other.read(case, "topk@0.1 budgets") is None and books.claim(case, "topk@0.1 budgets")
    assert books.read(case, "stock")["kinds"] == ("dense",) and not other.claim(case, "stock")


@pytest.mark.parametrize(("name", "keeps"), [("", (0.05, 0.15)), (" unlevel", (0.05, 0.05))])
def test_budgets_are_level_between_processes(name, keeps):
    model = replace(which.MODELS["wan14b-720p"], tiny=which.cases("ways", True)[0].model.tiny)
    pipe = build(model, torch.device("cpu"), torch.float32, tiny=True)
    _, course = which.course_of("topk@0.1 budgets" + name, 1)
    method, options = course.options(pipe.transformer, 0)
    heads = dict(options["schedule"].head_keep)
    assert method.keep == 0.1 and len(heads) == len(pipe.transformer.blocks)
    assert heads[0][:2] == pytest.approx(keeps) and sum(heads[0]) == pytest.approx(0.4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_of_ways(tmp_path):
    rows = "stock,pooled@0.1,sla@0.1,topk@0.1 budgets"
    record = rehearse(tmp_path / "x.json", "--parts", "ways", "--rows", rows)
    assert len(record["rows"]) == 20 and all(multi_gpu.sound(row) for row in record["rows"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_of_shared_clips(tmp_path):
    record = rehearse(tmp_path / "x.json", "--parts", "ulysses,joint")
    rows = record["rows"]
    assert all(multi_gpu.sound(row) for row in rows)
    assert all(row["together"]["communicating"] > 0 for row in rows if "refused" not in row)
    sparse = [row for row in rows if row.get("off_stock")]
    assert sparse and all(row["error"] < 1e-3 * row["off_stock"] for row in sparse)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rehearsal_of_a_queue(tmp_path):
    rows = rehearse(tmp_path / "x.json", "--parts", "batch", "--jobs", "12")["rows"]
    assert len(rows) == 3 and all(multi_gpu.sound(row) for row in rows)
    assert all("seconds" in row["together"] for row in rows if "together" in row)
