"""tune: sensitivity against errors by hand, the search, the preset, resuming, the command."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import saved_tiny_wan

import dit_accel
from dit_accel.cli import main as cli
from dit_accel.config import AccelConfig, resolve
from dit_accel.evaluate import Study, tune
from dit_accel.evaluate.probe import watching
from dit_accel.evaluate.profiled import Way
from dit_accel.evaluate.rows import Row
from dit_accel.evaluate.sensitivity import Sensitivity, measure
from dit_accel.evaluate.tune import warmups_of
from dit_accel.generation.loading import load_pipeline
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate
from dit_accel.media.quality import quality
from dit_accel.schedule import Schedule

GENERATION = {"height": 96, "width": 96, "num_frames": 5, "num_inference_steps": 4, "fps": 8}
TEMPLATE = AccelConfig(dit_accel.TopK(), dit_accel.Schedule(warmup=1), min_tokens=0)
FELT = Sensitivity({0: {0.1: 0.5, 0.5: 0.2}, 1: {0.1: 0.05, 0.5: 0.01}})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION, layers=3)


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(model, device="cpu")


def test_a_limit_decides_every_layer():
    base = Schedule(warmup=2)
    assert FELT.limits() == [0.0, 0.01, 0.05, 0.2, 0.5]
    assert FELT.schedule(base, 0.0) == Schedule(2, dense_layers=(0, 1))
    assert FELT.schedule(base, 0.05) == Schedule(2, dense_layers=(0,), layer_keep=((1, 0.1),))
    assert FELT.schedule(base, 0.5) == Schedule(2, layer_keep=((0, 0.1), (1, 0.1)))
    kept = [FELT.planned(Schedule(warmup=0), e, 0.25, 4) for e in (0.0, 0.01, 0.5)]
    assert kept == pytest.approx([1, 0.75, 0.1])
    assert FELT.planned(Schedule(warmup=1), 0.5, 0.25, 4) == pytest.approx((1 + 3 * 0.1) / 4)
    assert Sensitivity.from_dict(json.loads(json.dumps(FELT.to_dict()))) == FELT


def test_warm_ups_that_differ():
    assert warmups_of(None, 20) == [0.15, 0.3, 0.45]
    assert warmups_of(None, 9) == [0.15, 0.3, 0.45]
    assert warmups_of([0.3, 0.25], 4) == [0.25, 0.3]
    assert warmups_of([1, 0, 2, 0.3], 4) == [0, 1, 2]  # two steps, by number or by share


@pytest.mark.parametrize(
    ("steps", "trained", "tried"),
    [(8, False, [1, 2, 0]), (4, True, [0, 1, 2]), (2, False, [1, 0]), (1, False, [0])],
)
def test_warm_ups_of_few_steps(steps, trained, tried):
    assert warmups_of(None, steps, trained) == tried


def test_watching_changes_nothing(loaded):
    pipe, defaults = loaded
    calls = []
    request = Request("a cat", steps=2)
    stock = generate(pipe, defaults, request)
    with dit_accel.accelerated(pipe, watching(lambda *args: calls.append(args))):
        watched = generate(pipe, defaults, request)
    assert torch.equal(stock.latents, watched.latents)
    q, k, v, out, call = calls[0]
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    passes = len({call.passname for *_, call in calls})
    assert len(calls) == 3 * 2 * passes


def test_sensitivity_is_the_error_of_each_layer(loaded):
    pipe, defaults = loaded
    request, calls = Request("a cat", seed=1), []
    config = replace(TEMPLATE, schedule=Schedule(warmup=0))
    found = measure(pipe, defaults, request, config, (0.5, 0.9))
    with dit_accel.accelerated(pipe, watching(lambda *args: calls.append(args))):
        generate(pipe, defaults, request)
    name = calls[0][-1].passname
    for layer in range(3):
        q, k, v, out, _ = next(
            c for c in calls if (c[-1].layer, c[-1].step, c[-1].passname) == (layer, 0, name)
        )
        tried = dit_accel.attention(q, k, v, dit_accel.TopK(0.5))
        error = float((tried - out).norm() / out.norm())
        assert found.errors[layer][0.5] == pytest.approx(error, rel=1e-5)
        assert found.errors[layer][0.9] == 0  # both of its two blocks
        assert error > 1e-3


def test_a_method_with_a_state_is_followed_from_step_to_step(loaded):
    config = replace(TEMPLATE, method=dit_accel.Rettention())
    found = measure(*loaded, Request("a cat"), config, (0.4,))
    errors = [row[0.4] for row in found.errors.values()]
    assert all(error > 0 for error in errors)  # the first step alone, which is full, has none


def test_states_of_two_keeps_are_apart(loaded):
    config = replace(TEMPLATE, method=dit_accel.Rettention())
    both = measure(*loaded, Request("a cat"), config, (0.3, 0.6)).errors
    alone = measure(*loaded, Request("a cat"), config, (0.6,)).errors
    assert {layer: row[0.6] for layer, row in both.items()} == {n: r[0.6] for n, r in alone.items()}


def test_nothing_to_measure_is_said(loaded):
    config = replace(TEMPLATE, schedule=Schedule(warmup=1.0))
    with pytest.raises(ValueError, match="leaves no step sparse"):
        measure(*loaded, Request("a cat"), config, (0.5,))


class Booked:
    """A study whose PSNR and speed follow from the planned keeps: what a search should find."""

    steps, share = 20, 0.5

    def __init__(self):
        self.seen = []

    def cell(self, row, prompt, seed):
        self.seen.append((row.name, prompt, seed))
        schedule = row.config.schedule
        keeps = dict(schedule.layer_keep)
        mean = sum(keeps.get(i, 1.0) for i in range(2)) / 2
        kept = schedule.warmup + (1 - schedule.warmup) * mean
        work = 0.5 * kept + 0.5
        psnr = 20 + 30 * kept
        figures = {"psnr": psnr, "work_kept": work, "speedup": 1 / work, "attention_kept": kept}
        return {**figures, "unplanned": {}}


def search(goal, budget=50):
    found = tune.Search(Booked(), goal, ["p"], [0], budget, lambda *a: None, lambda line: None)
    way = Way("topk", TEMPLATE, FELT)
    assert found.bisect(way, 0.2) == found.best
    return found, way


def exhaustive(goal, way):
    study, base = Booked(), way.at(0.2, 20).schedule
    trials = [
        tune.score(study, Row("x", "x", replace(TEMPLATE, schedule=felt)), ["p"], [0])
        for felt in (FELT.schedule(base, e) for e in FELT.limits())
    ]
    return min((t for t in trials if goal.met(t)), key=goal.rank, default=None)


@pytest.mark.parametrize(
    "goal",
    [tune.Goal(psnr=x) for x in (26.5, 30.0, 40.0, 49.0)]
    + [tune.Goal(speedup=x) for x in (1.05, 1.2, 1.5)],
)
def test_bisection_finds_what_trying_everything_finds(goal):
    found, way = search(goal)
    best = exhaustive(goal, way)
    assert (found.best.psnr, found.best.work) == (best.psnr, best.work)
    assert len(found.trials) <= 3


def test_goals_out_of_reach_and_budgets():
    assert search(tune.Goal(speedup=3.0))[0].best is None
    assert len(search(tune.Goal(psnr=30.0), budget=1)[0].trials) == 1


def test_a_hopeless_warm_up_is_not_tried():
    found, way = search(tune.Goal(psnr=27.0))
    tried = len(found.trials)
    assert found.bisect(way, 0.9) is None
    assert len(found.trials) == tried


@pytest.mark.parametrize("wrong", [{}, {"psnr": 30.0, "speedup": 2.0}, {"psnr": 200.0}])
def test_goals_that_are_none(wrong):
    with pytest.raises(ValueError):
        tune.Goal(**wrong)


def test_the_frontier_is_what_no_other_trial_beats():
    def at(work, psnr):
        return tune.Trial(Row("x", "x", TEMPLATE), psnr, psnr, work, 1 / work)

    kept = tune.frontier([at(0.5, 30.0), at(0.6, 29.0), at(0.7, 35.0), at(0.5, 28.0)])
    assert [(t.work, t.psnr) for t in kept] == [(0.5, 30.0), (0.7, 35.0)]


def test_the_preset_is_what_was_measured(loaded, tmp_path):
    pipe, defaults = loaded
    options = {"methods": ["topk"], "warmups": [0.3], "keeps": [0.5], "trials": 3}
    study = Study(pipe, defaults, Request("-"), tmp_path)
    goal = tune.Goal(psnr=12.0)
    done = tune.tune(study, goal, ["a cat"], ["a dog"], TEMPLATE, **options)
    chosen = resolve(tmp_path / "preset.json")
    assert chosen.to_dict() == done["chosen"]["config"]
    assert done["chosen"]["psnr"] >= 12
    with dit_accel.accelerated(pipe, tmp_path / "preset.json"):
        made = generate(pipe, defaults, Request("a dog"))
    dense = generate(pipe, defaults, Request("a dog"))
    assert quality(dense.frames, made.frames).psnr_mean == pytest.approx(
        done["on_held_out"]["psnr"]
    )
    before = (tmp_path / "cells.jsonl").read_bytes()
    again = tune.tune(
        Study(pipe, defaults, Request("-"), tmp_path),
        goal,
        ["a cat"],
        ["a dog"],
        TEMPLATE,
        **options,
    )
    assert (tmp_path / "cells.jsonl").read_bytes() == before  # nothing was run twice
    assert again == done
    assert (tmp_path / "frontier.svg").read_text().startswith("<svg")


def test_what_is_tried_of_few_steps(loaded, tmp_path):
    study = Study(*loaded, Request("-", steps=2), tmp_path)
    goal, options = tune.Goal(psnr=12.0), {"keeps": [0.5], "trials": 1}
    done = tune.tune(study, goal, ["a cat"], ["a dog"], TEMPLATE, **options)
    assert list(done["sensitivity"]) == ["shared", "pooled", "topk"]
    assert done["trials"][0]["config"]["schedule"]["warmup"] == 1


def test_a_model_that_stays_dense_is_said(loaded, tmp_path):
    study = Study(*loaded, Request("-"), tmp_path)
    with pytest.raises(ValueError, match="nothing ran sparse.*fewer than the crossover"):
        tune.tune(
            study,
            tune.Goal(psnr=30.0),
            ["a cat"],
            ["a dog"],
            replace(TEMPLATE, min_tokens=None),
            methods=["topk"],
            keeps=[0.5],
        )


def test_prompts_are_in_one_list_only(loaded, tmp_path):
    study = Study(*loaded, Request("-"), tmp_path)
    with pytest.raises(ValueError, match="'a cat' is held out and tuned on"):
        tune.tune(study, tune.Goal(psnr=30.0), ["a cat"], ["a cat"], TEMPLATE)


def test_the_command(model, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\na dog\n")
    where = ["--model", str(model), "--device", "cpu", "--min-tokens", "0", "--steps", "2"]
    how = ["--methods", "topk", "--warmups", "0.5", "--keeps", "0.5", "--trials", "2"]
    out = tmp_path / "out"
    arguments = ["tune", "-o", str(out), "--prompts", str(prompts), *where, *how]
    assert cli.run([*arguments, "--psnr", "6"]) == 0
    shown = capsys.readouterr().out
    assert "on 1 prompts it did not see" in shown
    assert resolve(out / "preset.json").method.name == "topk"
    assert cli.run([*arguments, "--speedup", "99"]) == 1
    assert "reached 99× speed-up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "tune towards one goal"),
        (["--psnr", "500"], "lies in [5, 100) dB, not 500"),
        (["--psnr", "30", "--warmups", "soon"], "warmups is a comma-separated list"),
        (["--psnr", "30", "--prompts", "none.txt"], "there is no prompt file none.txt"),
        (["--psnr", "30", "--model", "./none"], "there is no folder ./none"),
    ],
)
def test_bad_input(arguments, says, tmp_path, capsys):
    assert cli.run(["tune", "-o", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_what_is_asked_for_is_tried_though_it_is_the_default(tmp_path):
    from dit_accel.cli.tune import SearchOptions

    assert SearchOptions().values()["methods"] is SearchOptions().values()["warmups"] is None
    asked = SearchOptions("pooled,topk", ".15,.3,.45", ".1,.2,.3,.5", profile=tmp_path / "p.json")
    values = asked.values()
    assert values["methods"] == ["pooled", "topk"] and values["warmups"] == [0.15, 0.3, 0.45]
    assert values["keeps"] == [0.1, 0.2, 0.3, 0.5]
    assert SearchOptions(profile=tmp_path / "p.json").values()["keeps"] is None
