"""The tables of figures say what their raw files say."""

import json
import re
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "benchmarks" / "results"
RUNS = {  # column of the tables of whole runs → stock and untrained rows, fine-tuned rows
    "Wan2.1 1.3B": ("wan1.3b-480p", "h100-e2e", "h100-e2e-sla", "pooled@0.1"),
    "Wan2.1 14B": ("wan14b-720p", "h100-e2e-large", "h100-e2e-large", "rectified@0.1"),
    "HunyuanVideo": ("hunyuan-720p", "h100-e2e-large", "h100-e2e-large", "rectified@0.1"),
}
TUNED = "sla@0.05+nowarmup"


@cache
def raw(name: str) -> dict:
    return json.loads((RAW / f"{name}.json").read_text())


def tables(page: str) -> list[list[list[str]]]:
    """Every table of a page as rows of cells, without bold type and code marks."""
    found, rows = [], []
    for line in [*(ROOT / page).read_text().split("\n"), ""]:
        if line.startswith("|"):
            rows.append([re.sub(r"[*`]", "", cell).strip() for cell in line[1:-1].split("|")])
        elif rows:
            found, rows = [*found, rows], []
    return found


def table(page: str, first: str) -> list[list[str]]:
    """The table whose heading begins with `first`, without the line of dashes."""
    (found,) = [rows for rows in tables(page) if rows[0][0].startswith(first)]
    return [found[0], *found[2:]]


def speedup(file: str, model: str, row: str) -> str:
    (found,) = [r for r in raw(file)["rows"] if (r["model"], r["row"]) == (model, row)]
    return f"{found['speedup']:.4f}"


def same(shown: str, measured: str) -> bool:
    """Is what is shown the measured figure, rounded to the digits that are shown?"""
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - float(measured)) <= 0.5 * 10**-digits + 1e-6


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
    "Wan2.1 1.3B, 480p, balanced": ("h200-steps-wan1.3b", "kinds balanced"),
    "… compiled": ("h200-steps-wan1.3b", "kinds balanced, compiled"),
    "… conservative": ("h200-steps-wan1.3b", "kinds conservative"),
    "Wan2.1 14B, 720p, balanced": ("h200-steps-wan14b", "kinds balanced"),
    "… 14B, conservative": ("h200-steps-wan14b-conservative", "kinds conservative"),
    "HunyuanVideo, 720p, 129 frames, balanced": ("h200-steps-hunyuan-2", "kinds balanced"),
    "… HunyuanVideo, conservative": ("h200-steps-hunyuan-conservative", "kinds conservative"),
}
CAREFUL = {  # file of the steps of `balanced` → of those of `conservative`; not measured compiled
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
            missing = cell == "" and kind == "dense" and "conservative" in label
            assert missing or same(cell, measured[kind]), (label, kind, cell)


def test_times_what_a_run_is_made_of():
    caches = {"conservative": "safe 0.05", "balanced": "balanced 0.1", "fast": "balanced 0.15"}
    columns = [STEPS[label] for label in STEPS if "conservative" not in label]
    (found,) = [rows for rows in tables("docs/results.md") if rows[0][1] == ", ".join(KINDS)]
    for label, counted, *cells in found[2:]:
        preset, cache = caches[label].split()
        name = f"--method shared:{preset} --step-cache {cache}"
        counts = [row["steps"] for row in raw("cpu-profile-steps")["rows"] if row["name"] == name]
        shown = [[int(n) for n in cell.split(" to ")] for cell in counted.split(", ")]
        ranges = [[min(c[kind] for c in counts), max(c[kind] for c in counts)] for kind in KINDS]
        assert [[cell[0], cell[-1]] for cell in shown] == ranges
        for cell, (file, case) in zip(cells, columns, strict=True):
            seconds = steps(file, case)
            if label == "conservative" and not case.endswith("compiled"):  # of which is a bound
                seconds = seconds | steps(CAREFUL[file], "kinds conservative")
            dense = 20 * steps(file, "kinds balanced")["dense"]
            times = [dense / sum(seconds[kind] * n for kind, n in row.items()) for row in counts]
            low, high = re.findall(r"[\d.]+", cell)
            assert same(low, min(times)) and same(high, max(times)), (label, case, cell)


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


def test_closeness():
    families = {
        "shared (default)": "shared",
        "DiTFastAttn (Rettention(rescale=False))": "ditfastattn",
        "rettention": "rettention",
        "rectified": "rectified-gapr",
        "pooled": "pooled",
        "topk": "topk",
    }
    heading, *shown = table("docs/results.md", "kept")
    found = {row["row"]: row["psnr"] for row in raw("h100-evaluate")["rows"]}
    tuned = {row["row"].partition(",")[0]: row["psnr"] for row in raw("h100-evaluate-sla")["rows"]}
    for label, *cells in shown:
        name = families.get(label, "sla")
        for kept, cell in zip(heading[1:5], cells, strict=False):
            measured = (tuned if name == "sla" else found).get(f"{name} {kept.replace(' ', '')}")
            assert cell == "" or same(cell.removesuffix(" dB"), measured), (label, kept, cell)
    assert len(shown) == 7


CHOICE = "docs/understand/methods/choice.md"
CHOSEN = {  # line of the tables of choices → what its rows are named by
    "4": "reuse-4",
    "8": "reuse-8",
    "layers:0,2,4,6,8 of 10": "layers2",
    'order="time"': "order-time",
    'select="per-head(…)"': "select-heads",
    'sort="per-head(…)"': "sort-heads",
    "… and more of the work early": "sort-heads-steps",
    "the best: PSNR of all 64": "sort-heads-steps",
}
PLAIN = {"shared 20": "shared 20%", "pooled 20": "pooled/sub 20%", "topk 20": "topk/sub 20%"}


@cache
def clips() -> dict[str, dict[str, float]]:
    """Row → prompt → PSNR."""
    both = raw("h200-evaluate-choice")["psnr"] | raw("h200-evaluate-choice-2")["psnr"]
    return {row: {prompt: psnr for prompt, _, psnr in cells} for row, cells in both.items()}


@pytest.mark.parametrize("first", ["reuse", ""])
def test_differences_of_the_same_clips(first):
    (found,) = [
        rows for rows in tables(CHOICE) if rows[0][0] == first and rows[0][2].startswith("20 % ¹")
    ]
    counts = {"¹": 48, "²": 32}
    for place, title in enumerate(found[0][1:], 1):
        method = ("shared", "pooled", "topk")[(place - 1) // 2]
        keep = re.search(r"\d+", title)[0]
        plain = clips()[PLAIN.get(f"{method} {keep}", f"{method}-reuse-none-{keep}")]
        assert len(plain) == counts.get(title[-1], 64)
        for label, *cells in found[2:]:
            cell = cells[place - 1].replace("−", "-")
            if label.startswith("sub itself"):
                assert same(cell, fmean(plain.values())), (label, title)
                continue
            name = CHOSEN[label]
            if method == "shared":
                name = name.removesuffix("-steps")
            if cell in ("–", "its default"):
                continue
            row = clips()[f"{method}-{name}-{keep}"]
            if label.startswith("the best"):
                assert same(cell, fmean(row.values())) and len(row) == 64, (label, title)
                continue
            gains = [row[prompt] - psnr for prompt, psnr in plain.items()]
            mean, error = cell.split(" ± ")
            assert same(mean, fmean(gains)), (label, title)
            assert same(error, stdev(gains) / len(gains) ** 0.5), (label, title)


BRANCHES = {  # row of the table of trained branches → its other name in the raw file
    "untrained, top-k": "untrained",
    "conv with linear=None": "conv alone",
    'combine="gate"': "gate",
    'select="learned"': "learned",
    "[eight of ten layers linear](#layers-of-linear-attention-alone)": "linear layers",
    "what ships, 1,500 steps": "shipped",
}


def paired(one: list[float], other: list[float]) -> tuple[float, float]:
    """The mean difference of the same clips, and its standard error."""
    gains = [a - b for a, b in zip(one, other, strict=True)]
    return fmean(gains), stdev(gains) / len(gains) ** 0.5


def gains(cell: str) -> list[str]:
    """Mean and error that a cell says."""
    return cell.replace("−", "-").split(" ± ")


def test_branches_trained_alike():
    found = raw("h200-finetune-branches")["rows"]
    (shown,) = [t for t in tables("docs/understand/methods/sla.md") if "velocity error" in t[0]]
    assert {BRANCHES.get(row[0], row[0]) for row in shown[2:]} == set(found)
    plain = found["plain"]["clips"]["psnr_each"]
    assert len(plain) == 32
    for label, error, psnr, gain, asked, cost in shown[2:]:
        row = found[BRANCHES.get(label, label)]
        clips = row["clips"]
        seen = [clips[name] for name in ("emoji", "place", "motion")]
        for said, share in zip(asked.removesuffix(" %").split(", "), seen, strict=True):
            assert same(said, 100 * share), label
        if label == "untrained, top-k":
            assert same(error, found["plain"]["before"])
        else:
            assert same(error, row["after"]) if "after" in row else error == "", label
        assert psnr == "" or same(psnr.removesuffix(" dB"), clips["psnr"]), label
        if gain:
            for said, value in zip(gains(gain), paired(clips["psnr_each"], plain), strict=True):
                assert same(said, value), label
        if cost:
            step, memory = cost.split(", ")
            assert same(memory, row["peak_gib"]), label
            assert step == "¹" or same(step, row["seconds_a_step"]), label


LONG = "h200-evaluate-scenes-17408"


def long_name(label: str) -> str:
    """What a row of the 17,408 tokens' tables is called in the raw files."""
    return label.removesuffix(" without GAPR").replace(" %", "%")


def first_seed() -> dict[str, dict]:
    """Rows of seed 0, each of the first file that has it; the fourth has another seed, too."""
    found: dict[str, dict] = {}
    for end in ("", "-2", "-3", "-4", "-6", "-7"):
        for row in raw(LONG + end)["rows"]:
            if end != "-4" or row["row"] in ("topk 10%", "pooled 10%"):
                found.setdefault(row["row"], row)
    return found


def test_two_seeds_at_17408_tokens():
    rows, other = {row["row"]: row for row in raw(f"{LONG}-5")["rows"]}, first_seed()
    page = tables("docs/measure/evaluate.md")
    (shown,) = [t for t in page if t[0][1:4] == ["all", "PSNR, seed 0", "seed 1 (dB)"]]
    assert shown[2][0] == "dense"
    asked_of = {"dense": (shown[2][-1], raw(f"{LONG}-5")["dense"])}
    lines = {long_name(line[0]): line for line in shown[3:]}
    assert lines.keys() == rows.keys()
    for name, (_, work, before, psnr, ssim, lpips, asked) in lines.items():
        row = rows[name]
        assert row["cells"] == 64
        assert same(work.removesuffix(" %"), 100 * row["work_kept"])
        mean, spread = psnr.split(" ± ")
        assert same(mean, row["psnr"]) and same(spread, row["psnr_sd"])
        assert same(ssim, row["ssim"]) and same(lpips, row["lpips"])
        if name not in other:
            assert before == "–"
        else:
            mean, _, count = before.removesuffix(")").partition(" (")
            assert same(mean, other[name]["psnr"]) and int(count or 64) == other[name]["cells"]
            assert abs(other[name]["psnr"] - row["psnr"]) < (0.5 if int(count or 64) > 32 else 1.1)
        asked_of[name] = (asked, row)
    for said, row in asked_of.values():
        shares = [row[key] for key in ("emoji", "place", "motion")]
        for share, measured in zip(said.removesuffix(" %").split(", "), shares, strict=True):
            assert same(share, 100 * measured)


def test_methods_without_a_state_at_17408_tokens():
    clips = {
        row: {prompt: psnr for prompt, _, psnr in cells}
        for row, cells in raw(f"{LONG}-5")["psnr"].items()
    }
    page = tables("docs/measure/evaluate.md")
    (compared,) = [t for t in page if t[0][1:2] == ["work"] and "13 of 20" in t[0][2]]
    controls = (
        *(f"dense, {n} of 20 steps" for n in (13, 8, 6)),
        "shared-q64-tile-steps-5 + cache@0.1",
    )
    for label, _, *cells in compared[2:]:
        mine = clips[long_name(label)]
        for control, cell in zip(controls, cells, strict=True):
            measured = paired([*mine.values()], [clips[control][prompt] for prompt in mine])
            for said, value in zip(gains(cell), measured, strict=True):
                assert same(said, value), (label, control)


def test_the_demo_on_a_gpu():
    rows = raw("h200-demo-speeds")["rows"]
    names = {
        "--speed balanced, which is make demo on a GPU": "speed-balanced",
        "--speed fast": "speed-fast",
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
