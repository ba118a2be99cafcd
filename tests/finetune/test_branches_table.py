"""benchmarks/finetune_branches.py: the shipped settings, its time, its books; all of it (slow)."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import finetune_branches as table  # noqa: E402

from dit_accel.config import resolve  # noqa: E402
from dit_accel.inputs.scene import Vocabulary  # noqa: E402


@pytest.fixture
def asked(monkeypatch, tmp_path):
    def options(*more):
        places = ["--out", str(tmp_path / "out.json"), "--folder", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", [table.__file__, *places, *map(str, more)])
        return table.options()

    return options


def test_whole_rows_are_trained_as_what_ships(asked):
    args = asked("--whole", "--steps", 1500)
    raw = json.loads((ROOT / "benchmarks" / "results" / "h200-finetune.json").read_text())
    shipped, mine = raw["sla"][0]["settings"], table.settings(args, "plain").to_dict()
    free = {"out", "data", "prompts", "samples", "device", "save_every", "validate_every"}
    same = {name for name, x in shipped.items() if mine.get(name) == x}
    assert set(shipped) - same - free <= {"method", "log_every", "frames"}
    preset = resolve(ROOT / "assets" / "emoji-sla" / "preset.json").method
    for name in ("keep", "select", "block_q", "block_k", "linear", "combine", "feature_map"):
        assert str(getattr(table.method(args, "plain"), name)) == str(getattr(preset, name))
    assert args.samples == shipped["samples"] and args.frames == 33
    assert set(args.rows.split(";")) <= set(table.ROWS)
    assert all(table.settings(args, name) for name in table.ROWS)
    assert len({str(table.method(args, name)) for name in args.rows.split(";")}) == 14


def test_scenes_are_in_no_prompt_file(asked):
    args = asked("--whole")
    found, known = table.prompts_of(args), Vocabulary.load(table.EMBEDDED)
    assert len(set(found)) == 256 and not set(found) & set(table.read_prompts(table.PROMPTS))
    assert all(known.read(text) for text in found) and found == table.prompts_of(args)


def test_a_row_that_would_be_late_gives_up_at_its_second_look(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(table.time, "monotonic", lambda: now[0])

    def run(seconds, end):
        progress = table.in_time(end)
        progress("loading", 0, None)
        for step in range(1, 101):
            now[0] += seconds
            progress("training", step, 100)

    run(1.0, 201.0)
    with pytest.raises(table.TooLate, match="2.00 s a step"):
        run(2.0, now[0] + 190)
    assert now[0] == 240


def test_a_process_that_ends_is_not_waited_for():
    child = table.Child([sys.executable, "-c", "print('hello')"], sys.stderr)
    noise = io.StringIO()
    assert not table.said(child, "ready", table.time.monotonic() + 60, noise)
    assert not table.said(child, "ready", table.time.monotonic() + 60, noise)
    assert noise.getvalue() == "hello\n"


def test_a_row_of_a_tiny_model(asked, model, monkeypatch, capsys):
    """Samples and dense clips once, then a row's training and its clips."""
    small = ["--size", 128, "--frames", 9, "--steps", 2, "--batch", 2, "--samples", 2]
    small += ["--clips", 2, "--denoise", 2, "--keep", 0.3, "--train", "lora", "--model", model]
    args = asked(*small, "--row", "gated & rms")
    books = table.Books(args)
    assert table.begin(args, books) > 0 and set(books.found) == {"dense", "untrained"}
    monkeypatch.setattr(sys, "stdin", io.StringIO("inf\n"))
    made = {path: path.stat().st_mtime_ns for path in (args.folder / "clips").glob("dense/*")}
    table.one_row(args, args.row)
    row = books.read(args.row)
    assert row["done"] and row["before"] != row["after"] and row["seconds_a_step"] > 0
    assert row["clips"]["cells"] == len(row["clips"]["psnr_each"]) == len(made) == 2
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert capsys.readouterr().out.endswith("ready\ndone\n")
    assert not books.read("rms") and not table.Books(asked("--steps", 3)).read(args.row)


def test_what_fails_is_a_row_that_says_so(asked, monkeypatch, capsys):
    args = asked("--row", "plain", "--data", "nowhere")
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    table.one_row(args, "plain")
    assert "nowhere" in table.Books(args).read("plain")["error"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_on_the_embedded_model(tmp_path):
    small = ["--size", "128", "--frames", "5", "--steps", "2", "--batch", "2", "--samples", "2"]
    small += ["--clips", "2", "--denoise", "4", "--rows", "rms;linear layers"]
    out = tmp_path / "out.json"
    command = [sys.executable, table.__file__, "--whole", *small, "--out", str(out)]

    def run(*more):
        subprocess.run([*command, "--folder", str(tmp_path / "runs"), *more], check=True)
        return json.loads(out.read_text())["rows"]

    first = run("--budget", "1")
    assert "not begun" in first["rms"]["error"] and first["shipped"]["clips"]["cells"] == 2
    rows = run()
    assert list(rows) == ["dense", "untrained", "shipped", "rms", "linear layers"]
    assert all({"before", "after", "clips"} <= set(rows[name]) for name in ("rms", "linear layers"))
    assert {"emoji", "motion"} <= set(rows["rms"]["clips"])
    assert run() == {**rows, **{n: {k: x for k, x in rows[n].items() if k != "took"} for n in rows}}
