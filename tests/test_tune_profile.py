"""tune from a profile: what its curves give, what is added and what stays, what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny import saved_tiny_wan

import dit_accel
from dit_accel.cli import main as cli
from dit_accel.config import AccelConfig, resolve
from dit_accel.evaluate import Study, profiled, tune
from dit_accel.evaluate.profile import measure
from dit_accel.evaluate.profiled import Way
from dit_accel.generation.loading import load_pipeline
from dit_accel.generation.request import Request
from dit_accel.methods.budget import Profile
from dit_accel.schedule import Plan, Schedule

GENERATION = {"height": 64, "width": 128, "num_frames": 9, "num_inference_steps": 2, "fps": 8}
TEMPLATE = AccelConfig(dit_accel.TopK(), min_tokens=0)


def curve(low, high):
    return {"0.1": low**2, "0.5": high**2}


FIRST = {"0": [curve(0.3, 0.0), curve(0.4, 0.3)], "1": [curve(0.1, 0.0), curve(0.8, 0.3)]}
SORTED = {name: [curve(0.1, 0.1)] * 2 for name in "01"}
WORSE = {name: [curve(0.9, 0.9)] * 2 for name in "01"}
PROFILE = Profile("topk", {"means": WORSE, "sub": FIRST}, {}, {}, {"none": FIRST, "time": SORTED})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION, layers=2)


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(model, device="cpu")


@pytest.fixture(scope="module")
def path(loaded, tmp_path_factory):
    config = AccelConfig(dit_accel.Pooled(select="sub"))
    found = measure(*loaded, Request("a cat"), config, (0.2, 0.5), ("means", "sub"), ("time",))
    assert found.model == "WanTransformer3DModel"
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    found.save(file)
    return file


def test_the_curves_of_heads_are_errors_of_layers_and_budgets():
    felt = profiled.layers_of(PROFILE.curves("sub"))
    wanted = {0: {0.1: 0.5, 0.5: 0.3}, 1: {0.1: 0.65**0.5, 0.5: 0.3}}
    assert felt.errors[0] == pytest.approx(wanted[0]) and felt.errors[1] == pytest.approx(wanted[1])
    own = profiled.heads_of(PROFILE.curves("sub"))
    for layer, row in own.heads.items():
        for total, keeps in row.items():
            assert sum(keeps) / 2 == pytest.approx(total)
            assert own.errors[layer][total] <= felt.errors[layer][total] + 1e-9
    assert own.errors[1][0.5] < 0.3  # 0.5 for one and more for the other
    found = own.schedule(Schedule(2), 0.5)
    assert found.dense_layers == () and not found.layer_keep
    assert dict(found.head_keep) == {0: own.heads[0][0.1], 1: own.heads[1][0.5]}
    assert own.planned(Schedule(0), 0.5, 0.25, 4) == pytest.approx(0.3)


@pytest.mark.parametrize(("warmup", "keep"), [(0.15, 0.2), (0.3, 0.6), (0.0, 0.1)])
def test_a_falling_curve_keeps_as_much_on_average(warmup, keep):
    for steps in (8, 20, 30, 50):
        base = Schedule(warmup=warmup)
        plan = Plan(profiled.falling(base, keep, steps), keep, 1, always=True)
        first = base.dense_steps(steps)
        kept = [plan.action(step, steps, 0).keep for step in range(first, steps)]
        assert sum(kept) / len(kept) == pytest.approx(keep)
        assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
        assert kept.count(kept[0]) == round(0.3 * len(kept))
    assert profiled.falling(Schedule(2), 0.2, 3) == Schedule(2)


class Booked:
    """A study whose PSNR follows from what is planned, from a sort and from the early steps."""

    steps, share = 20, 1.0

    def __init__(self, **bonus):
        self.bonus = bonus

    def cell(self, row, prompt, seed):
        config = row.config
        plan = Plan(config.schedule, config.method.keep, 2)
        keeps = [plan.action(step, 20, n).keep for step in range(20) for n in (0, 1)]
        kept = sum(1.0 if k is None else sum(k) / 2 if isinstance(k, tuple) else k for k in keeps)
        has = {"sort": config.method.sort, "early": config.schedule.step_keep}
        has["heads"] = config.schedule.head_keep
        psnr = 20 + 30 * kept / 40 + sum(self.bonus[name] for name in self.bonus if has[name])
        figures = {"psnr": psnr, "work_kept": kept / 40, "speedup": 40 / kept}
        return {**figures, "attention_kept": kept / 40, "unplanned": {}}


@pytest.mark.parametrize(
    ("bonus", "stays"),
    [
        ({"sort": 9.0, "early": -9.0}, {"sort"}),
        ({"early": 9.0, "heads": -9.0, "sort": -9.0}, {"early"}),
    ],
    ids=["an order", "early"],
)
def test_an_addition_stays_where_it_is_better(bonus, stays, tmp_path):
    PROFILE.save(tmp_path / "p.json")
    goal = tune.Goal(psnr=40.0)
    found = tune.Search(Booked(**bonus), goal, ["p"], [0], 99, lambda *a: None, lambda line: None)
    way = profiled.begun(PROFILE, "topk", TEMPLATE)
    assert way.name == "topk/sub"  # which errs less than means
    found.climb(way, profiled.additions(PROFILE, tmp_path / "p.json", "topk"), [0.15, 0.3])
    config = found.best.row.config
    assert bool(config.method.sort) == ("sort" in stays)
    assert bool(config.schedule.step_keep) == ("early" in stays)
    later = [t.row.config for t in found.trials if "warm-up 0.3" in t.row.name]
    assert all(bool(c.method.sort) == ("sort" in stays) for c in later)


def test_what_does_not_go_with_a_method_is_not_tried(tmp_path):
    PROFILE.save(tmp_path / "p.json")

    felt = profiled.layers_of(PROFILE.curves("sub"))

    def tried(method, name):
        way = Way("x", replace(TEMPLATE, method=method), felt)
        added = profiled.additions(PROFILE, tmp_path / "p.json", name)
        return [add(way) is not None for add in added]

    assert tried(dit_accel.TopK(select="sub"), "topk") == [True, True, True]
    assert tried(dit_accel.SharedResidual(), "shared") == [True, False, True]
    assert tried(dit_accel.Rettention(), "rettention") == [False, False, False]
    assert tried(dit_accel.TopK(), "checkpoint") == [True]
    own = replace(TEMPLATE, method=dit_accel.TopK(select="slash"))
    with pytest.raises(ValueError, match="has the selectors means, sub, not slash"):
        profiled.begun(PROFILE, "topk/slash", own)


def test_the_preset_holds_its_orders_and_no_method_was_thrown_away(loaded, path, tmp_path):
    study = Study(*loaded, Request("-"), tmp_path / "tuned")
    options = {"methods": ["topk"], "warmups": [0.0], "trials": 3, "profile": path}
    done = tune.tune(study, tune.Goal(psnr=10.0), ["a cat"], ["a dog"], TEMPLATE, **options)
    assert "sensitivity" not in (tmp_path / "tuned" / "cells.jsonl").read_text()
    assert done["profile"] == str(path) and set(done["sensitivity"]["topk"]["0"]) == {"0.2", "0.5"}
    trial = next(t for t in done["trials"] if "order per head" in t["name"])
    folder = tmp_path / "moved"
    tune._save(AccelConfig.from_dict(trial["config"]), tmp_path / "tuned")
    shutil.copytree(tmp_path / "tuned", folder)
    shutil.rmtree(tmp_path / "tuned")
    method = resolve(folder / "preset.json").method
    assert method.sorting.file == str(folder / "orders.json")
    assert method.sorting.known == Profile.load(path).sorts


def test_a_profile_of_something_else_is_refused(loaded, path, tmp_path, model, capsys):
    pipe, known = loaded[0], Profile.load(path)
    profiled.check_profile(known, path, pipe)
    profiled.check_profile(replace(known, model=""), path, pipe)  # older than the name
    one = {name: {"0": rows["0"]} for name, rows in known.heads.items()}
    wide = {name: {n: [*row, row[0]] for n, row in x.items()} for name, x in known.heads.items()}
    heads = len(known.heads["sub"]["0"])
    for other, says in (
        (replace(known, model="Flux"), f"of Flux with 2 layers of {heads} heads"),
        (replace(known, heads=one), f"with 1 layers of {heads} heads"),
        (replace(known, heads=wide), f"with 2 layers of {heads + 1} heads"),
    ):
        with pytest.raises(ValueError, match=says):
            profiled.check_profile(other, path, pipe)
    where = ["--model", str(model), "--device", "cpu", "--psnr", "30"]
    out = ["tune", "-o", str(tmp_path / "out"), "--profile", str(path)]
    assert cli.run([*out, *where, "--keeps", "0.2,0.3"]) == 2
    assert "measured at the keeps 0.2, 0.5, not at 0.3" in capsys.readouterr().err
    for heads in ({}, {"sub": {}}):
        none = {**json.loads(path.read_text()), "heads": heads}
        (tmp_path / "none.json").write_text(json.dumps(none))
        with pytest.raises(ValueError, match="no errors of heads"):
            profiled.read(tmp_path / "none.json", None)
    assert set(profiled.read(path, (0.5,)).curves("sub")[0, 0]) == {0.5}
