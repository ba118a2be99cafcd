"""The rows of the proof keep as much as they say, and its journals become one table."""

import json
import sys
from pathlib import Path

import pytest

from dit_accel.bench.rows import Row
from dit_accel.config import resolve
from dit_accel.schedule import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import proof_rows
import proof_table


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.2])
def test_every_file_keeps_as_much_on_average(keep):
    for name, config in proof_rows.files(keep, None).items():
        plan = Plan(config.schedule, config.method.keep, 10)
        kept = [plan.action(step, 20, 0).keep for step in range(3, 20)]
        assert sum(kept) / len(kept) == pytest.approx(keep), name
        if config.method.stateful and name.endswith(f"-steps-{keep:.0%}".rstrip("%")):
            assert len(config.method.full_steps(3, 20)) == 1  # the others are the schedule's


def test_files_of_reuse_and_of_heads_keep_as_much_and_are_read_again(tmp_path, monkeypatch, capsys):
    error = {"0": [{"0.1": 0.4, "0.2": 0.3}]}
    known = {"method": "pooled", "steps": {}, "overlap": {}}
    known |= {"heads": {"sub": error, "slash": error}, "sorts": {"none": error, "time": error}}
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(known))
    argv = ["x", str(tmp_path), "--keep", "0.1", "--reuse", "none", "4+passes", "--per-head"]
    monkeypatch.setattr(sys, "argv", [*argv, str(profile)])
    proof_rows.main()
    names = capsys.readouterr().out.strip().split(",")
    assert len(names) == len(set(names)) == 3 * (2 + 3) + 2
    for name in names:
        config = resolve(name)
        plan = Plan(config.schedule, config.method.keep, 10)
        kept = [plan.action(step, 20, 0).keep for step in range(3, 20)]
        assert sum(kept) / len(kept) == pytest.approx(0.1), name
        assert ("reuse-4" in name) == (str(config.method.reuse) == "4+passes")
        assert ("sort-heads" in name) == bool(config.method.sort)
        assert ("order-time" in name) == (config.order == "time")
        assert ("select-heads" in name) == str(config.method.select).startswith("per-head")


def journal(folder: Path, batch: int, lines: list[dict]) -> Path:
    folder.mkdir()
    head = {"setting": {"batch": batch, "machine": str(folder)}}
    (folder / "cells.jsonl").write_text("\n".join(map(json.dumps, [head, *lines])) + "\n")
    return folder


def cell(row: str, prompt: str, psnr: float) -> dict:
    named = {"key": f"{row} #0 {prompt}", "row": row, "family": row, "prompt": prompt, "seed": 0}
    shares = {"attention_kept": 0.3, "work_kept": 0.4, "ssim": 0.9, "latent_error": 0.1}
    return {**named, **shares, "psnr": psnr, "flicker": [1.0, 1.0], "unplanned": [], "seconds": 9}


def test_journals_become_one_table(tmp_path, monkeypatch, capsys):
    row, other = "/tmp/rows/shared-q64-tile-steps-5.json + cache@0.1", "topk 10%"
    one = journal(tmp_path / "1", 8, [cell(row, "a", 30.0), cell(other, "a", 20.0)])
    two = journal(tmp_path / "2", 8, [cell(row, "b", 40.0)])
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    argv = ["x", str(one), str(two), "--out", str(out), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", argv)
    proof_table.main()
    record = json.loads(out.read_text())
    (line,) = record["rows"]  # the other was not measured on all prompts
    assert line["row"] == "shared-q64-tile-steps-5 + cache@0.1" and line["psnr"] == 35
    assert line["family"] == "shared + step cache" and "seconds" not in line
    assert "35.00" in capsys.readouterr().out and "shared + step cache" in plot.read_text()
    later = {
        "rows": [{**line, "psnr": 1.0}, {"row": "dense+cache@0.1", "work_kept": 0.5, "psnr": 9}]
    }
    (tmp_path / "later.json").write_text(json.dumps(later))
    drawn = plot.read_text()
    argv = ["x", "--tables", str(out), str(tmp_path / "later.json"), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", argv)
    proof_table.main()
    assert plot.read_text().count("<circle") == drawn.count("<circle") + 2  # and its legend
    assert "step cache</text>" in plot.read_text() and ">1.0" not in plot.read_text()
    with pytest.raises(ValueError, match="another setting"):
        proof_table.read([one, journal(tmp_path / "3", 4, [])])


def test_linear_layers_in_eight_bits_are_a_part_of_a_row():
    row = Row.parse("sla@0.05+nowarmup+compile+quantize-fp8")
    assert row.stock == "stock+compile+quantize-fp8"
    with pytest.raises(ValueError, match="quantize-fp4"):
        Row.parse("stock+quantize-fp4")
