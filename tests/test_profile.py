"""profile: errors of heads against those by hand, the keep of each head, the command."""

import itertools
import re

import pytest
import torch
from tiny import saved_tiny_wan

import dit_accel
from dit_accel.cli import main as cli
from dit_accel.config import AccelConfig, named, resolve
from dit_accel.evaluate.profile import Look, measure
from dit_accel.evaluate.rows import rows
from dit_accel.generation.loading import load_pipeline
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate
from dit_accel.methods import Call
from dit_accel.methods.budget import Profile, allocate, at, head_keep, least
from dit_accel.schedule import Plan, Schedule

GENERATION = {"height": 192, "width": 192, "num_frames": 9, "num_inference_steps": 4, "fps": 8}
KEEPS = (0.2, 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION, layers=2)


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(model, device="cpu")


@pytest.fixture(scope="module")
def found(loaded):
    config = AccelConfig(dit_accel.SharedResidual())
    return measure(*loaded, Request("a cat"), config, KEEPS, ("means", "sub"), mass=True)


def test_errors_fall_with_keep_and_heads_sum_to_the_layer(found):
    assert found.method == "pooled" and set(found.heads) == {"means", "sub"}
    for name in found.heads:
        curves = found.curves(name)
        assert {layer for layer, _ in curves} == {0, 1}
        assert all(curve[0.5] < curve[0.2] for curve in curves.values())
        layers = [sum(c[0.2] for (n, _), c in curves.items() if n == layer) for layer in (0, 1)]
        mean = sum(x**0.5 for x in layers) / 2
        assert found.steps[name]["0"]["0.2"] == pytest.approx(mean, rel=1e-4)
    assert set(found.steps["sub"]) == {"0"} and not found.overlap


def test_a_profile_is_a_file(found, tmp_path):
    found.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == found
    with pytest.raises(ValueError, match="has the selectors means, sub, not exact"):
        found.curves("exact")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="Profile needs"):
        Profile.load(tmp_path / "other.json")


def test_equal_curves_keep_alike():
    curve = {0.1: 0.5, 0.2: 0.3, 0.4: 0.1}
    chosen = allocate({(0, h): curve for h in range(4)}, 0.2)
    assert sum(chosen.values()) == pytest.approx(0.8)
    assert sum(at(curve, keep) for keep in chosen.values()) == pytest.approx(4 * 0.3)


def test_the_choice_is_that_of_brute_force():
    keeps = (0.1, 0.2, 0.3, 0.4)
    curves = {
        (0, 0): dict(zip(keeps, (0.9, 0.4, 0.2, 0.1), strict=True)),
        (0, 1): dict(zip(keeps, (0.1, 0.06, 0.03, 0.01), strict=True)),
        (1, 0): dict(zip(keeps, (0.5, 0.45, 0.1, 0.05), strict=True)),  # not convex
    }
    for total in (0.1, 0.2, 0.3):
        chosen = allocate(curves, total)
        assert sum(chosen.values()) == pytest.approx(3 * total)
        error = sum(at(curves[n], keep) for n, keep in chosen.items())
        tried = [
            sum(curves[n][k] for n, k in zip(curves, row, strict=True))
            for row in itertools.product(keeps, repeat=3)
            if sum(row) <= 3 * total + 1e-9
        ]
        assert error <= min(tried) + 1e-9 or total == 0.2  # between two points of the hull
    with pytest.raises(ValueError, match="outside what was measured, 0.1 to 1"):
        allocate(curves, 0.05)


def test_the_mass_of_heads_and_the_least_keep_that_holds_one(found, tmp_path):
    masses = found.masses("sub")
    assert set(masses) == set(found.curves("sub"))
    assert all(0 < curve[0.2] < curve[0.5] < 1 for curve in masses.values())
    for curve in masses.values():
        keep = (0.2 + 0.5) / 2
        between = (curve[0.2] + curve[0.5]) / 2
        assert least(curve, between) == pytest.approx(keep)
        assert least(curve, curve[0.2] / 2) == 0.2 and least(curve, 1) == 1
    path = tmp_path / "profile.json"
    found.save(path)
    total, keeps = head_keep(f"{path}@mass0.9", dit_accel.TopK(select="sub"))
    each = {(n, h): keep for n, row in keeps for h, keep in enumerate(row)}
    assert each == {place: least(curve, 0.9) for place, curve in masses.items()}
    assert total == pytest.approx(sum(each.values()) / len(each))
    with pytest.raises(ValueError, match="has the mass of means, sub, not of slash"):
        head_keep(f"{path}@mass0.9", dit_accel.TopK(select="slash"))
    for text, match in (("@mass2", "a mass is a share"), ("@massive", "heads is a profile and")):
        with pytest.raises(ValueError, match=match):
            head_keep(f"{path}{text}", dit_accel.TopK(select="sub"))


def test_mass_is_the_exact_share_of_the_chosen_blocks():
    q, k, v = (2 * torch.randn(1, 2, 320, 16) for _ in range(3))
    look = Look(dit_accel.TopK(0.2), (0.2, 0.6), ("means",), mass=True)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    look(q, k, v, out, Call(1.0, grid=(5, 8, 8), step=0))
    exact = (q @ k.mT / 4).softmax(-1)
    for keep in (0.2, 0.6):
        mask = dit_accel.TopK(keep).table(q, k, Call(keep)).to_mask()
        held = exact * mask.repeat_interleave(64, 2).repeat_interleave(64, 3)
        wanted = held.sum(-1).mean((0, 2)).tolist()
        assert look.mass["means", 0, keep][0] == pytest.approx(wanted, rel=1e-4)


def test_leaders_are_those_of_brute_force(found):
    assert set(found.layers) == {"1"} and 0 < found.layers["1"]["0"] < 1
    assert found.leaders(1) == (0,) and found.leaders(2) == (0, 1)
    draw = torch.Generator().manual_seed(3)
    names = (0, 1, 2, 4, 5, 7)
    overlap = {(j, i): float(torch.rand((), generator=draw)) for j in names for i in names if i < j}
    rows = {str(j): {str(i): overlap[j, i] for i in names if i < j} for j in names if j}
    profile = Profile("topk", {}, {}, {}, layers=rows)
    for count in range(1, 6):
        tried = []
        for rest in itertools.combinations(names[1:], count - 1):
            leaders = (0, *rest)
            followed = [
                overlap[n, max(x for x in leaders if x < n)] for n in names if n not in leaders
            ]
            tried.append((min(followed), sum(followed), leaders))
        assert profile.leaders(count) == max(tried)[2]
    with pytest.raises(ValueError, match="leaders are 1 to 6 layers"):
        profile.leaders(7)


def test_a_budget_of_heads_runs_and_keeps_its_total(found, loaded):
    pipe, defaults = loaded
    schedule = found.schedule(Schedule(warmup=1, step_keep=((2, 0.6),)), 0.3, "sub")
    keeps = dict(schedule.head_keep)
    assert sum(map(sum, keeps.values())) / sum(map(len, keeps.values())) == pytest.approx(0.3)
    config = AccelConfig(dit_accel.TopK(0.3, select="sub"), schedule, min_tokens=0)
    assert AccelConfig.from_dict(config.to_dict()) == config
    plan = Plan(schedule, 0.3, 2)
    doubled = tuple(min(1.0, 2 * x) for x in keeps[1])
    assert plan.action(1, 4, 1).keep == keeps[1]
    assert plan.action(2, 4, 1).keep == pytest.approx(doubled)
    with dit_accel.accelerated(pipe, config) as handle:
        generate(pipe, defaults, Request("a cat"))
        assert set(handle.report().fallbacks) == {"warm-up step"}


@pytest.mark.parametrize("heads", [((0, ()),), ((0, (0.2, 0.0)),), ((0, (1.5,)),)])
def test_shares_of_heads_outside_are_refused(heads):
    with pytest.raises(ValueError, match="head_keep"):
        Schedule(head_keep=heads)
    with pytest.raises(ValueError, match="rettention reads the same blocks"):
        AccelConfig(dit_accel.Rettention(), Schedule(head_keep=((0, (0.2,)),)))


def test_one_grammar():
    for text, keep, selector in (
        ("topk", 0.25, "means"),
        ("pooled/sub@0.1", 0.1, "sub"),
        ("shared/sub(8):fast", 0.05, "sub(8)"),
    ):
        method = named(text)
        assert (method.keep, str(method.select)) == (keep, selector)
        assert resolve(text).method == method
    for text, message in (
        ("topk/best", "unknown selector 'best'"),
        ("topk@much", "'much' after @ is no share"),
        ("topk@2", "'2' after @ is no share"),
        ("topk:", "no preset ''"),
    ):
        with pytest.raises(ValueError, match=message):
            named(text)
    names = ["topk/sub+reuse@4+passes", "pooled/sub@0.1"]
    table = rows(names, [0.1, 0.2], 4, AccelConfig(named("topk")))
    assert [row.name for row in table] == [
        "topk/sub 10% + reuse@4 + passes",
        "topk/sub 20% + reuse@4 + passes",
        "pooled/sub 10%",
    ]
    method = table[0].config.method
    assert (method.keep, str(method.select), str(method.reuse)) == (0.1, "sub", "4+passes")


def test_the_command(model, tmp_path, capsys):
    path = tmp_path / "profile.json"
    common = ["--model", str(model), "--device", "cpu", "--min-tokens", "0"]
    tried = ["--try", "sub", "--try", "tree", "--sorts", "none,time", "--linear", "--mass"]
    assert cli.run(["profile", "a cat", "-o", str(path), *tried, *common]) == 0
    seen = capsys.readouterr().out
    assert "pooled/" in seen and re.search(r"--heads \S+@0.12", seen)
    assert set(Profile.load(path).heads) == {"sub", "tree"} and "'per-head(" in seen
    sorts = Profile.load(path).sorts
    assert set(sorts) == {"none", "time"} and sorts["none"] != sorts["time"] and "--sort" in seen
    linear = Profile.load(path).linear
    assert set(linear) == {"0", "1"} and all(0 < error < 1 for error in linear.values())
    assert re.search(r"--heads \S+@mass0.9", seen) and set(Profile.load(path).mass) == {
        "sub",
        "tree",
    }
    assert re.search(r"finetune --linear-layers \S+@0.75", seen)
    assert cli.run(["profile", "a cat", "-o", str(path), "--try", "window", *common]) == 2
    options = ["--select", f"per-head({path})", "--heads", f"{path}@0.2", "--reuse", "2+passes"]
    options += ["--sort", f"per-head({path})"]
    options += ["--step-keep", "0.5:0.1", "--refresh", "0.5,0.75", "-o", str(tmp_path / "c.mp4")]
    assert cli.run(["generate", "a cat", "--method", "shared", *options, *common]) == 0
    assert cli.run(["selectors"]) == 0 and "sub" in capsys.readouterr().out
    assert cli.run(["branches"]) == 0 and "decay" in capsys.readouterr().out
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "options",
    [["--step-keep", "much"], ["--refresh", "never"], ["--heads", "none.json@0.1"]],
    ids=lambda x: x[0],
)
def test_bad_options_are_one_sentence(options, capsys):
    assert cli.run(["generate", "a cat", *options]) == 2
    assert "Traceback" not in capsys.readouterr().err
