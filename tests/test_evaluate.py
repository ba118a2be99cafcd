"""evaluate: cells that agree with a run by hand, resuming, tables, plots, the command."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from tiny import saved_tiny_wan, tiny_wan

import dit_accel
from dit_accel.cli import main as cli
from dit_accel.config import AccelConfig
from dit_accel.evaluate import Study, clips
from dit_accel.evaluate.journal import Journal
from dit_accel.evaluate.rows import PRUNING, Row, rows
from dit_accel.evaluate.run import Budget, evaluate
from dit_accel.evaluate.tables import markdown, summary, write
from dit_accel.generation.loading import EMBEDDED, Defaults, load_pipeline
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate
from dit_accel.inputs.prompts import read_prompts
from dit_accel.media import quality
from dit_accel.pages.scatter import Point, scatter

GENERATION = {"height": 96, "width": 96, "num_frames": 5, "num_inference_steps": 4, "fps": 8}
TEMPLATE = AccelConfig(dit_accel.TopK(), dit_accel.Schedule(warmup=1), min_tokens=0)
BASE = Request("-")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION, layers=3)


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(model, device="cpu")


def test_what_a_step_cache_skips_is_no_work(loaded, tmp_path):
    pipe, defaults = loaded
    study = Study(pipe, defaults, BASE, tmp_path)
    skipping, computing = rows(["dense+cache@1e9", "dense+cache@1e-9"], (), 4, TEMPLATE)
    found = study.cell(skipping, "a cat", 0)
    layers = len(pipe.transformer.blocks)  # the first step runs all, the others the first block
    assert found["work_kept"] == pytest.approx((layers + study.steps - 1) / layers / study.steps)
    assert study.cell(computing, "a cat", 0)["work_kept"] == 1
    assert study.cell(computing, "a cat", 0)["psnr"] == 100


def test_a_cell_is_what_a_run_by_hand_gives(loaded, tmp_path):
    pipe, defaults = loaded
    study = Study(pipe, defaults, BASE, tmp_path)
    row = Row("topk 40%", "topk", replace(TEMPLATE, method=dit_accel.TopK(0.4)))
    cell = study.cell(row, "a cat", 3)
    request = Request("a cat", seed=3)
    dense = generate(pipe, defaults, request)
    with dit_accel.accelerated(pipe, row.config) as handle:
        made = generate(pipe, defaults, request)
        kept = handle.report().kept
    near = quality.quality(dense.frames, made.frames)
    assert cell["psnr"] == near.psnr_mean < quality.IDENTICAL_DB
    assert cell["ssim"] == near.ssim_mean
    assert cell["latent_error"] == quality.latent_error(dense.latents, made.latents)
    assert cell["attention_kept"] == pytest.approx(kept)
    assert cell["work_kept"] == pytest.approx(1 - study.share * (1 - kept))
    assert cell["flicker"] == list(near.flicker)


def test_controls_count_all_their_work(loaded, tmp_path):
    study = Study(*loaded, BASE, tmp_path)
    dense = replace(TEMPLATE, method=dit_accel.Dense())
    fewer = study.cell(Row("2 steps", "fewer steps", dense, 2), "a cat", 0)
    assert fewer["work_kept"] == fewer["attention_kept"] == 0.5
    same = study.cell(Row("4 steps", "fewer steps", dense), "a cat", 0)
    assert (same["psnr"], same["latent_error"], same["work_kept"]) == (100.0, 0.0, 1.0)
    prune = dit_accel.TokenPruning(keep=0.3, refresh=4, start=1, end=0, block=8)
    pruned = study.cell(Row("pruned", "p", replace(dense, prune=prune)), "a cat", 0)
    # steps 1 to 3 run 3 of 9 blocks of tokens (0.3 rounded up) through one layer of three
    t = 3 / 9
    attention, rest = 1 - (1 - t**2) / 3, 1 - (1 - t) / 3
    mean = study.share * attention + (1 - study.share) * rest
    assert pruned["work_kept"] == pytest.approx((1 + 3 * mean) / 4)


def test_an_evaluation_goes_on_where_it_stopped(loaded, tmp_path, monkeypatch):
    pipe, defaults = loaded
    table = rows(["steps", "pooled"], (0.5,), 4, TEMPLATE)
    study = Study(pipe, defaults, BASE, tmp_path)
    first = evaluate(study, table, ["a cat", "a dog"], [0], budget=Budget(2))
    assert (len(first["cells"]), first["missing"]) == (2, 2 * len(table) - 2)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"key": "torn')  # killed while writing
    asked = []
    real = Study._measure
    monkeypatch.setattr(Study, "_measure", lambda self, *a: asked.append(a[0]) or real(self, *a))
    study = Study(pipe, defaults, BASE, tmp_path)
    notes = []
    done = evaluate(study, table, ["a cat", "a dog"], [0], note=notes.append)
    assert done["missing"] == 0
    assert len(asked) == len(notes) == 2 * len(table) - 2
    assert done["cells"][:2] == first["cells"]
    again = evaluate(Study(pipe, defaults, BASE, tmp_path), table, ["a cat", "a dog"], [0])
    assert again["cells"] == done["cells"]
    assert len(asked) == 2 * len(table) - 2
    assert len(list((tmp_path / "dense").iterdir())) == 2
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == done["rows"]
    assert [row["cells"] for row in done["rows"]] == [2] * len(table)
    for name in ("quality-work.svg", "quality-time.svg"):
        dots = ET.parse(tmp_path / name).findall(".//{*}circle/{*}title")
        assert len(dots) == len(table)


def test_another_setting_is_refused(loaded, tmp_path):
    Study(*loaded, BASE, tmp_path)
    with pytest.raises(ValueError, match="choose another --output"):
        Study(*loaded, replace(BASE, steps=3), tmp_path)
    (tmp_path / "cells.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="is damaged"):
        Study(*loaded, BASE, tmp_path)
    (tmp_path / "cells.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="no journal"):
        Study(*loaded, BASE, tmp_path)


def test_a_refused_row_is_named_and_the_others_go_on(tmp_path):
    pipe = tiny_wan(layers=2)
    defaults = Defaults(**{**GENERATION, "num_inference_steps": 2})
    study = Study(pipe, defaults, BASE, tmp_path)
    late = replace(TEMPLATE, schedule=dit_accel.Schedule(warmup=9))
    table = [Row("late", "topk", late), Row("dense", "dense", AccelConfig(dit_accel.Dense()))]
    data = evaluate(study, table, ["a cat"], [0])
    assert "9 dense warm-up steps" in data["rows"][0]["error"]
    assert data["rows"][1]["psnr"] == 100
    text = markdown(data["rows"])
    assert "late: refused" in text
    assert text.count("\n| ") == 2
    assert not hasattr(pipe.transformer, "_dit_accel")


def test_means_and_spread():
    cell = {"row": "r", "family": "f", "attention_kept": 0.5, "work_kept": 0.5, "ssim": 1.0}
    cell |= {"seconds": 1.0, "dense_seconds": 2.0, "speedup": 2.0, "state_bytes": 0}
    cell |= {"unplanned": {}}
    one = {**cell, "psnr": 20.0, "flicker": [2.0, 3.0]}
    two = {**cell, "psnr": 30.0, "flicker": [0.0, 3.0]}
    (row,) = summary([one, two, {"row": "r", "family": "f", "error": "no"}])
    assert (row["psnr"], row["cells"], row["flicker"]) == (25.0, 2, 1.5)
    assert row["psnr_sd"] == pytest.approx(50**0.5)
    assert "latent_error" not in row
    assert "25.00 ± 7.07" in markdown([row]) and "calls" not in markdown([row])
    (row,) = summary([{**one, "together": 8}, {**two, "together": 2}])
    assert "r: measured in calls of 2 and 8 clips: the last may hold fewer" in markdown([row])


def test_a_plot_escapes_and_places():
    points = [Point("a<b", "n&m", 10.0, 20.0), Point("a<b", "far", 50.0, 40.0)]
    root = ET.fromstring(scatter(points, "x", "y", 100.0))
    near, far = (dot for dot in root.iter("{http://www.w3.org/2000/svg}circle") if len(dot))
    assert float(near.get("cx")) < float(far.get("cx"))
    assert float(near.get("cy")) > float(far.get("cy"))
    assert near[0].text.startswith("n&m: 10")


def test_criteria_and_identical_clips_are_no_lines(tmp_path):
    common = {"work_kept": 0.5, "seconds": 1.0, "dense_seconds": 2.0, "attention_kept": 0.5}
    common |= {
        "cells": 1,
        "psnr_sd": 0.0,
        "ssim": 1.0,
        "speedup": 2.0,
        "flicker": None,
        "unplanned": [],
    }
    table = [
        {**common, "row": name, "family": family, "psnr": psnr}
        for name, family, psnr in (
            ("drift", PRUNING, 20.0),
            ("lru", PRUNING, 21.0),
            ("topk", "topk", 22.0),
            ("dense", "dense", quality.IDENTICAL_DB),
        )
    ]
    write(tmp_path, {"rows": table})
    root = ET.parse(tmp_path / "quality-time.svg").getroot()
    assert len(root.findall("{*}polyline")) == 1
    assert len([dot for dot in root.findall("{*}circle") if len(dot)]) == 3
    write(tmp_path / "all", {"rows": table[3:]})
    assert not (tmp_path / "all" / "quality-time.svg").exists()


def test_a_journal_keeps_whole_lines_only(tmp_path):
    path = tmp_path / "deep" / "j.jsonl"
    Journal(path, {"a": 1}).add("k", {"v": 2})
    path.write_bytes(path.read_bytes() + b'{"key"')
    journal = Journal(path, {"a": 1})
    assert journal.lines == {"k": {"key": "k", "v": 2}}
    journal.add("l", {"v": 3})
    assert list(Journal(path, {"a": 1}).lines) == ["k", "l"]


def test_no_prompt_is_tuned_on_and_reported():
    report = read_prompts(EMBEDDED.parent / "prompts.txt")
    tuning = read_prompts(EMBEDDED.parent / "prompts-tuning.txt")
    table = read_prompts(EMBEDDED.parent / "prompts-report.txt")
    assert len(tuning) >= 8 and len(table) == 64
    assert not {*report, *table} & set(tuning)


def test_the_command(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n\na cat\n")
    where = ["--model", str(model), "--device", "cpu", "--min-tokens", "0"]
    what = ["--rows", "steps,topk", "--keeps", "0.5", "--prompts", str(prompts), "--limit", "2"]
    out = tmp_path / "out"
    assert cli.run(["evaluate", "-o", str(out), *what, *where]) == 0
    assert "cells are left" in capsys.readouterr().out
    assert (out / "table.md").read_text().startswith("| row |")
    more = ["--resume", "--no-attention"]
    assert cli.run(["evaluate", "-o", str(out), *what, *where, *more]) == 0
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert len(cells) == 4 and len({cell["row"] for cell in cells}) == 4
    assert cli.run(["evaluate", "-o", str(out), *what, *where, *more, "--batch", "2"]) == 2
    assert "was measured with batch = 1, not 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "magic"], "unknown method 'magic'"),
        (["--keeps", "a,b"], "keeps is a comma-separated list"),
        (["--keeps", "2"], "lies in (0, 1], not 2"),
        (["--seeds", ""], "seeds is a comma-separated list"),
        (["--prompts", "none.txt"], "there is no prompt file none.txt"),
        (["--resume"], "holds no evaluation to go on with"),
        (["--minutes", "-1"], "above 0, not -1"),
        (["--sla-weights", "none.safetensors"], "there is no weights file"),
    ],
)
def test_bad_input(arguments, says, tmp_path, capsys):
    assert cli.run(["evaluate", "-o", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_call_of_several_clips_gives_those_of_single_calls(loaded, tmp_path):
    pipe, defaults = loaded
    row = Row("topk 40%", "topk", replace(TEMPLATE, method=dit_accel.TopK(0.4)))
    pairs = [("a cat", 3), ("a dog", 4), ("a cat", 5)]
    alone = [Study(pipe, defaults, BASE, tmp_path / "1").cell(row, *pair) for pair in pairs]
    study = Study(pipe, defaults, BASE, tmp_path / "3", batch=3)
    together = study.cells(row, pairs)
    for a, b in zip(alone, together, strict=True):
        assert (b["prompt"], b["seed"], b["together"]) == (a["prompt"], a["seed"], 3)
        for name in ("psnr", "ssim", "latent_error", "work_kept"):
            assert b[name] == pytest.approx(a[name], rel=1e-2), name
    assert len({cell["psnr"] for cell in together}) == 3
    assert study.cells(row, pairs) == together  # nothing is measured twice
    assert study.dense.known("a dog", 4)["together"] == 3


def test_a_call_that_does_not_fit_is_halved(loaded, tmp_path, monkeypatch):
    pipe, defaults = loaded
    real, asked = clips.make, []

    def make(pipe, defaults, requests):
        asked.append(len(requests))
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pipe, defaults, requests)

    monkeypatch.setattr(clips, "make", make)
    study = Study(pipe, defaults, BASE, tmp_path, batch=4)
    row = Row("topk 40%", "topk", replace(TEMPLATE, method=dit_accel.TopK(0.4)))
    data = evaluate(study, [row], ["a cat", "a dog", "a bat"], [0, 1])
    assert data["missing"] == 0
    assert asked == [4, 2, 2, 4, 2, 2, 2, 2]  # dense, then the row; the last call holds two
    assert data["rows"][0]["cells"] == 6 and "mixed_calls" not in data["rows"][0]
    monkeypatch.setattr(clips, "make", lambda *a: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        Study(pipe, defaults, BASE, tmp_path / "none").cell(row, "a cat", 0)


def test_a_budget_of_time_ends_before_it_is_over(loaded, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("dit_accel.evaluate.run.time.monotonic", lambda: clock[0])

    def cells(self, row, pairs):
        clock[0] += 40
        return real(self, row, pairs)

    real = Study.cells
    monkeypatch.setattr(Study, "cells", cells)
    study = Study(*loaded, BASE, tmp_path)
    table = rows(["steps"], (), 4, TEMPLATE)
    data = evaluate(study, table, ["a cat"], [0, 1], budget=Budget(minutes=2.5, began=0.0))
    assert clock[0] == 120  # a fourth call of 40 s would end at 160 s, after 150
    assert len(data["cells"]) == 3
    assert "| dense |" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="above 0, not 0"):
        Budget(minutes=0)


def test_weights_that_were_replaced_in_place_are_another_study(tmp_path):
    """The folder of the model is called as before."""
    pipe, out = tiny_wan(), tmp_path / "eval"
    defaults = Defaults.from_pipeline(pipe)
    base = Request("-", steps=2, height=32, width=32, frames=5)
    Study(pipe, defaults, base, out, "m")
    Study(pipe, defaults, base, out, "m")
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1.01)
    with pytest.raises(ValueError, match="was measured with other weights: choose another --out"):
        Study(pipe, defaults, base, out, "m")
