"""The tables of how close clips are say what their raw files say."""

import re
from functools import cache
from statistics import fmean, stdev

import pytest
from figures import raw, same, table, tables


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
    """Rows of seed 0, each of the first file that has it."""
    found: dict[str, dict] = {}
    for end in ("-8", "", "-2", "-3", "-6", "-7"):
        for row in raw(LONG + end)["rows"]:
            found.setdefault(row["row"], row)
    return found


def asked(row: dict) -> list[float]:
    """Emoji, places and motion as asked for, in per cent."""
    return [100 * row[name] for name in ("emoji", "place", "motion")]


def holds(cells: list[str], row: dict) -> None:
    """Are these a row's work, PSNR, SSIM, LPIPS and what was asked for, of 64 clips?"""
    work, psnr, ssim, lpips, said = cells
    assert row["cells"] == 64
    measured = [100 * row["work_kept"], row["psnr"], row["psnr_sd"], row["ssim"], row["lpips"]]
    shown = [
        work.removesuffix(" %"),
        *psnr.split(" ± "),
        ssim,
        lpips,
        *said.removesuffix(" %").split(", "),
    ]
    for text, value in zip(shown, [*measured, *asked(row)], strict=True):
        assert same(text, value), row["row"]


@pytest.mark.parametrize(
    "file, title, first",
    [
        ("h200-evaluate-scenes-3", ["row", "attention", "all"], 2),
        (f"{LONG}-8", ["row", "all", "PSNR (dB)"], 1),
    ],
)
def test_every_method_as_it_comes(file, title, first):
    found = {row["row"]: row for row in raw(file)["rows"] if "cache" not in row["row"]}
    if first == 2:
        found |= {row["row"]: row for row in raw("h200-evaluate-cache")["rows"]}
    page = tables("docs/measure/evaluate.md")
    (shown,) = [t for t in page if t[0][:3] == title and t[0][-2:-1] == ["LPIPS"]]
    for share, measured in zip(
        shown[2][-1].removesuffix(" %").split(", "), asked(raw(file)["dense"]), strict=True
    ):
        assert same(share, measured)
    names = [long_name(line[0]) for line in shown[3:]]
    assert {*names} == {name for name in found if first == 2 or "30%" in name}
    for name, line in zip(names, shown[3:], strict=True):
        holds(line[first:], found[name])
        if first == 2:
            assert same(line[1].removesuffix(" %"), 100 * found[name]["attention_kept"])


def test_the_step_cache_beside_first_block_cache():
    page = tables("docs/measure/evaluate.md")
    (shown,) = [t for t in page if t[0][1:2] == ["First-Block-Cache: all"]]
    files = ("h200-evaluate-scenes", "h200-evaluate-scenes-3"), ("h200-evaluate-cache",)
    before, now = ({r["row"]: r for name in each for r in raw(name)["rows"]} for each in files)
    for name, *cells in shown[2:]:
        for row, work, psnr in zip((before[name], now[name]), cells[::2], cells[1::2], strict=True):
            assert same(work.removesuffix(" %"), 100 * row["work_kept"]), name
            assert same(psnr, row["psnr"]), name


def test_two_seeds_at_17408_tokens():
    rows, other = {row["row"]: row for row in raw(f"{LONG}-5")["rows"]}, first_seed()
    page = tables("docs/measure/evaluate.md")
    (shown,) = [t for t in page if t[0][1:4] == ["all", "PSNR, seed 0", "seed 1 (dB)"]]
    assert shown[2][0] == "dense"
    said = shown[2][-1].removesuffix(" %").split(", ")
    assert all(map(same, said, asked(raw(f"{LONG}-5")["dense"])))
    lines = {long_name(line[0]): line[1:] for line in shown[3:]}
    assert lines.keys() == rows.keys()
    for name, (work, before, *cells) in lines.items():
        holds([work, *cells], rows[name])
        if name not in other:
            assert before == "–"
            continue
        assert same(before, other[name]["psnr"]) and other[name]["cells"] == 64
        assert abs(other[name]["psnr"] - rows[name]["psnr"]) < (
            0.9 if name == "shared 50%" else 0.5
        )


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
