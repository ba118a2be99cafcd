"""The tables of figures say what their raw files say."""

import json
import re
from statistics import fmean

import pytest
from figures import RAW, raw, same, table, tables

from dit_accel.generation.speeds import options

RUNS = {  # column of the tables of whole runs → stock and untrained rows, fine-tuned rows
    "Wan2.1 1.3B": ("wan1.3b-480p", "h100-e2e", "h100-e2e-sla", "pooled@0.1"),
    "Wan2.1 14B": ("wan14b-720p", "h100-e2e-large", "h100-e2e-large", "rectified@0.1"),
    "HunyuanVideo": ("hunyuan-720p", "h100-e2e-large", "h100-e2e-large", "rectified@0.1"),
}
TUNED = "sla@0.05+nowarmup"


def speedup(file: str, model: str, row: str) -> str:
    (found,) = [r for r in raw(file)["rows"] if (r["model"], r["row"]) == (model, row)]
    return f"{found['speedup']:.4f}"


@pytest.mark.parametrize("column", RUNS)
def test_whole_runs_on_the_front_page(column):
    model, file, tuned, method = RUNS[column]
    rows = {
        "dense, compiled": (file, "stock+compile"),
        "sparse, 10 % kept": (file, method),
        "sparse, compiled": (file, f"{method}+compile"),
        "fine-tuned SLA, 5 % kept": (tuned, TUNED),
        "fine-tuned SLA, compiled": (tuned, f"{TUNED}+compile"),
    }
    if column == "Wan2.1 1.3B":
        rows["dense, compiled"] = (tuned, "stock+compile")
    heading, *shown = [row for row in tables("README.md")[0] if set(row[0]) != {"-"}]
    (place,) = [i for i, title in enumerate(heading) if title.startswith(column)]
    (stock,) = [row for row in raw(tuned)["rows"] if (row["model"], row["row"]) == (model, "stock")]
    for label, *cells in shown:
        cell = cells[place - 1]
        if label.startswith("dense, stock"):
            assert same(cell.removesuffix(" s").replace(",", ""), stock["run_seconds"]), cell
        else:
            where, row = rows[label]
            assert same(cell.removesuffix("×"), speedup(where, model, row)), (label, cell)
    assert len(shown) == len(rows) + 1


@pytest.mark.parametrize("column", RUNS)
def test_whole_runs_in_the_results(column):
    model, file, tuned, method = RUNS[column]
    full = "+cudnn+compile+prune+cache" if method == "pooled@0.1" else "+compile+prune+cache"
    steps = {
        "sparse attention": ("", ""),
        "… --compile": ("+compile", "+compile"),
        "… --prune 0.5": ("+compile+prune", "+compile+prune"),
        "… --step-cache, every second step skipped": (full, "+compile+prune+cache"),
    }
    heading, *rows = table("docs/results.md", "50 steps")
    (place,) = [i for i, title in enumerate(heading) if title.startswith(column)]
    found = {row[0]: row[place] for row in rows}
    for label, (untrained, trained) in steps.items():
        left, right = re.findall(r"([\d.]+)×", found[label])
        assert same(left, speedup(file, model, method + untrained)), (label, left)
        assert same(right, speedup(tuned, model, TUNED + trained)), (label, right)


def test_rows_of_whole_models():
    """Each row of docs/measure/bench.md is one of a raw file, in every column."""
    rows = [r for path in RAW.glob("h100-e2e*.json") for r in json.loads(path.read_text())["rows"]]
    found = [rows_ for rows_ in tables("docs/measure/bench.md") if "dense step s" in rows_[0]]
    assert len(found) == 4
    for heading, _, *shown in found:
        for cells in shown:
            said = {k: v for k, v in zip(heading, cells, strict=True) if v and k != "note"}
            assert any(said == {"row": r["row"], **figures(r, said)} for r in rows), said


def figures(row: dict, asked: dict[str, str]) -> dict[str, str]:
    names = {"kept": "kept", "run s": "run_seconds", "peak GiB": "peak_gib"}
    names |= {"× eager": "speedup", "× cuDNN": "speedup_cudnn"}
    values = {f"{kind} step s": value for kind, value in row.get("seconds", {}).items()}
    values |= {title: row.get(name) for title, name in names.items()}
    shown = {k: v for k, v in asked.items() if k in values and values[k] is not None and k != "row"}
    return {k: v if same(v, values[k]) else f"{values[k]}" for k, v in shown.items()}


def steps(file: str, case: str) -> dict[str, float]:
    (found,) = [x for x in raw(file)["cases"] if x["case"] == case]
    return found["step_seconds"]


KINDS = ["dense", "full", "sparse", "skipped"]
STEPS = {  # row of the table of steps → file and case
    "Wan2.1 1.3B, 480p, 5 %": ("h200-steps-wan1.3b", "kinds balanced"),
    "… compiled": ("h200-steps-wan1.3b", "kinds balanced, compiled"),
    "… 10 %": ("h200-steps-wan1.3b", "kinds conservative"),
    "Wan2.1 14B, 720p, 5 %": ("h200-steps-wan14b", "kinds balanced"),
    "… 14B, 10 %": ("h200-steps-wan14b-conservative", "kinds conservative"),
    "HunyuanVideo, 720p, 129 frames, 5 %": ("h200-steps-hunyuan-2", "kinds balanced"),
    "… HunyuanVideo, 10 %": ("h200-steps-hunyuan-conservative", "kinds conservative"),
}
CAREFUL = {  # file of the steps at 5 % → of those at 10 %; not measured compiled
    "h200-steps-wan1.3b": "h200-steps-wan1.3b",
    "h200-steps-wan14b": "h200-steps-wan14b-conservative",
    "h200-steps-hunyuan-2": "h200-steps-hunyuan-conservative",
}


def test_the_steps_of_a_profile():
    (found,) = [rows for rows in tables("docs/results.md") if rows[0][1:] == KINDS]
    assert [row[0] for row in found[2:]] == list(STEPS)
    for label, *cells in found[2:]:
        measured = {"dense": steps("h200-steps-wan1.3b", "kinds balanced")["dense"]}
        measured |= steps(*STEPS[label])
        for kind, cell in zip(KINDS, cells, strict=True):
            missing = cell == "" and kind == "dense" and "10 %" in label
            assert missing or same(cell, measured[kind]), (label, kind, cell)


def test_times_what_a_run_is_made_of():
    columns = [STEPS[label] for label in STEPS if "10 %" not in label]
    (shown,) = [rows for rows in tables("docs/results.md") if rows[0][1] == ", ".join(KINDS)]
    for label, counted, *cells in shown[2:]:
        found = [row for row in raw("cpu-profiles")["rows"] if row["options"] == options(label)]
        counts = [row["steps"] for row in found]
        assert len(counts) == 3
        shown = [[int(n) for n in cell.split(" to ")] for cell in counted.split(", ")]
        ranges = [[min(c[kind] for c in counts), max(c[kind] for c in counts)] for kind in KINDS]
        assert [[cell[0], cell[-1]] for cell in shown] == ranges
        for cell, (file, case) in zip(cells, columns, strict=True):
            seconds = steps(file, case)
            if label != "fast" and not case.endswith("compiled"):  # of which is a bound
                seconds = seconds | steps(CAREFUL[file], "kinds conservative")
            dense = 20 * steps(file, "kinds balanced")["dense"]
            times = [dense / sum(seconds[kind] * n for kind, n in row.items()) for row in counts]
            said = re.findall(r"[\d.]+", cell)
            assert same(said[0], min(times)) and same(said[-1], max(times)), (label, case, cell)


def test_the_profiles_on_a_cpu():
    (found,) = [rows for rows in tables("docs/results.md") if rows[0][-1] == "loop, each prompt"]
    for label, psnr, computed, kept, times in found[2:]:
        rows = raw("cpu-profiles")["rows"]
        rows = [row for row in rows if row["options"] == options(label.removeprefix("--speed "))]
        assert all(map(same, psnr.split(" / "), [row["psnr"] for row in rows]))
        assert all(map(same, times[:-1].split(" / "), [1 / row["time"] for row in rows]))
        for share, name in ((computed, "computed"), (kept, "kept")):
            assert same(share.removesuffix(" %"), 100 * fmean(row[name] for row in rows))


def test_what_a_table_costs():
    page = tables("docs/understand/methods/choice.md")
    (found,) = [rows for rows in page if rows[0][1] == "kernels, ms"]
    cases = {
        case["case"].partition(": ")[2].replace("PROFILE", "profile.json"): case
        for case in raw("h200-operators-rest")["cases"]
        if case["case"].startswith("selector")
    }
    assert [row[0] for row in found[2:]] == sorted(cases, key=lambda name: cases[name]["us"])
    for name, kernels, called, memory in found[2:]:
        case = cases[name]
        assert same(kernels, case["us"] / 1e3) and same(called, case["ms"]), name
        assert same(memory.removesuffix(" MB"), case["peak_bytes"] / 1e6), name


def test_the_demo_on_a_gpu():
    rows = raw("h200-demo-speeds")["rows"]
    names = {
        "--speed balanced as it was, First-Block-Cache at 0.1": "speed-balanced",
        "--speed fast as it was, at 0.15": "speed-fast",
        "--method shared --keep 0.05 --step-cache 0.1": "early5-cache10",
        "--method shared --keep 0.05": "early5",
        "--method shared:balanced, the demo before": "method-balanced",
    }
    (shown,) = [t for t in tables("docs/results.md") if "steps computed" in t[0]]
    assert {row[0] for row in shown[2:]} == set(names)
    for label, computed, seconds, speedup, psnr in shown[2:]:
        row = rows[names[label]]
        whole = [step for step in row["attention"]["steps"] if step["sparse"] + step["dense"] == 10]
        assert len(whole) == int(computed.split()[0])
        assert same(seconds, row["times"]["accelerated"]["denoise"])
        assert same(speedup.removesuffix("×"), row["speedup"]["denoise"])
        assert same(psnr.removesuffix(" dB"), row["quality"]["psnr_mean"])


def test_norm_and_rotary_embedding():
    cases = raw("h200-norm-rope")["as launched"]["cases"]
    page = tables("docs/results.md")
    (shown,) = [t for t in page if t[0][-1] == "a copy of q and k"]
    columns = ("stock", "stock, compiled", "ours", "copy")
    for line, case in zip(shown[2:], cases, strict=True):
        for said, name in zip(line[1:], columns, strict=True):
            time, _, share = said.partition(", ")
            assert same(time, case["ms"][name])
            if share:
                assert same(share.removesuffix(" %"), 100 * case["ms"]["copy"] / case["ms"][name])
        assert case["error"]["ours"] < 1.001 * case["error"]["stock"]
    runs = raw("h200-norm-rope-runs")["runs"]
    (shown,) = [t for t in page if t[0][1:3] == ["without", "with"]]
    for line in shown[2:]:
        before, after = (float(cell) for cell in line[1:3])
        assert round(100 * (after / before - 1)) == -int(line[3].strip("−% "))
    steps = [{case["case"]: case.get("step_seconds") for case in run["cases"]} for run in runs[5:9]]
    small, small_without, large, large_without = steps
    found = [
        *(x["kinds balanced"]["sparse"] for x in (small_without, small)),
        *(x["kinds balanced, compiled"]["sparse"] for x in (small_without, small)),
        *(x["kinds balanced"]["dense"] for x in (small_without, small)),
        *(x["kinds fast"]["sparse"] for x in (large_without, large)),
    ]
    eight = [{r["row"]: r["seconds"] for r in run["rows"] if r["batch"] == 8} for run in runs[3:5]]
    for row in ("shared:balanced + cache@0.1", "topk 10%"):
        found += [x[row] for x in reversed(eight)]
    said = [cell for line in shown[2:] for cell in line[1:3]]
    for text, value in zip(said, found, strict=True):
        assert same(text, value)
