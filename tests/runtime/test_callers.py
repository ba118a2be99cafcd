"""Whose steps are counted: those of the pipeline that runs, whichever object it is."""

import copy
import gc
import threading

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from drive import arguments, build
from support import calls, flux
from tiny import tiny_flux

import dit_accel
from dit_accel import Schedule
from dit_accel.forward import caller

QUARTER = {"schedule": Schedule(warmup=0.25), "min_tokens": 0}
EXPECTED = {"warm-up step": 4}  # of 8 steps the first two, in two layers


def another(pipe, kind=FluxPipeline, **parts):
    """A second pipeline object with the same transformer."""
    other = kind(**pipe.components | parts)
    other.set_progress_bar_config(disable=True)
    return other


def own_scheduler(pipe):
    return another(pipe, scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("make", [another, own_scheduler])
@pytest.mark.parametrize("method", ["topk", "shared"])
@pytest.mark.parametrize("before", ["nothing", "the first ran", "the first is gone"])
def test_the_pipeline_that_runs_is_followed(make, method, before):
    pipe = tiny_flux()
    handle = dit_accel.accelerate(pipe, method, **QUARTER)
    if before == "the first ran":
        flux(pipe, steps=2)
        handle = dit_accel.accelerate(pipe, method, **QUARTER)
    other = make(pipe)
    if before == "the first is gone":
        del pipe
        gc.collect()
    flux(other, steps=8)
    report = handle.report()
    assert report.fallbacks == EXPECTED and report.generations == 1
    assert [row["step"] for row in report.steps] == list(range(8))


def test_a_scheduler_that_was_exchanged_is_followed():
    pipe = tiny_flux()
    handle = dit_accel.accelerate(pipe, "topk", **QUARTER)
    flux(pipe, steps=2)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    flux(pipe, steps=8)
    steps = handle.report().steps
    assert [row["dense"] > 0 for row in steps] == [True] * 2 + [False] * 6


def test_pipelines_that_take_turns_count_their_own_steps():
    pipe = tiny_flux()
    handle = dit_accel.accelerate(pipe, "topk", **QUARTER)
    seen = []

    def interrupt(running, step, t, inputs):
        if step == 4:
            flux(other, steps=4)
        return inputs

    other = own_scheduler(pipe)
    pipe.transformer.register_forward_pre_hook(lambda *_: None)
    flux(pipe, steps=8, callback_on_step_end=interrupt)
    report = handle.report()
    seen = [row["step"] for row in report.steps]
    assert seen == [5, 6, 7] and calls(report) == 2 * (8 + 4)
    assert report.fallbacks == {"warm-up step": 4 + 2}


def test_image_to_image_over_the_same_transformer():
    pipe = tiny_flux()
    handle = dit_accel.accelerate(pipe, "topk", **QUARTER)
    other = another(pipe, FluxImg2ImgPipeline)
    flux(other, steps=8, strength=0.5, image=torch.rand(1, 3, 64, 64))
    report = handle.report()
    assert [row["step"] for row in report.steps] == [0, 1, 2, 3]
    assert report.fallbacks == {"warm-up step": 2}


def test_a_pipeline_in_another_thread():
    pipe = tiny_flux()
    handle = dit_accel.accelerate(pipe, "topk", **QUARTER)
    other = own_scheduler(pipe)
    thread = threading.Thread(target=flux, args=(other,), kwargs={"steps": 8})
    thread.start()
    thread.join()
    assert handle.report().fallbacks == EXPECTED


def by_hand(pipe, scheduler, steps=8):
    """A loop of one's own: no pipeline's call."""
    transformer = pipe.transformer
    scheduler.set_timesteps(steps, mu=0.5)
    x, ids = torch.randn(1, 64, 16), torch.zeros(64, 3)
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    for t in scheduler.timesteps:
        v = transformer(
            x,
            encoder_hidden_states=torch.zeros(1, 16, 32),
            pooled_projections=torch.zeros(1, 32),
            timestep=t.expand(1) / 1000,
            img_ids=ids,
            txt_ids=torch.zeros(16, 3),
            return_dict=False,
        )[0]
        x = scheduler.step(v, t, x, return_dict=False)[0]


def test_a_loop_of_ones_own_after_a_short_run():
    pipe = tiny_flux()
    handle = dit_accel.accelerate(pipe, "topk", **QUARTER)
    flux(pipe, steps=2)
    handle = dit_accel.accelerate(pipe, "topk", **QUARTER)
    with torch.no_grad():
        by_hand(pipe, pipe.scheduler)
    assert handle.report().fallbacks == EXPECTED


def test_a_forward_after_a_run_is_none_of_its_steps():
    pipe, given = tiny_flux(), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    flux(pipe, steps=3)
    hook.remove()
    handle = dit_accel.accelerate(pipe, "topk", schedule=Schedule(cooldown=1), min_tokens=0)
    with torch.no_grad():
        for _ in range(2):
            pipe.transformer(**given[0])
    report = handle.report()
    assert not report.fallbacks and report.kept < 1


def test_a_copy_of_a_pipeline_with_its_own_scheduler():
    pipe = tiny_flux()
    handle = dit_accel.accelerate(pipe, "topk", **QUARTER)
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    flux(other, steps=8)
    assert handle.report().fallbacks == EXPECTED


def steps_of(name, **more):
    """The report of one call of a pipeline of tests/pipelines/drive.py, a quarter of it warm-up."""
    pipe = build(name)
    handle = dit_accel.accelerate(pipe, "topk", **QUARTER)
    with torch.no_grad():
        pipe(**arguments(name) | more)
    return handle.report()


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_only_its_copies_step():
    name = "SkyReelsV2DiffusionForcingPipeline"
    for more, steps in (({}, 8), ({"ar_step": 2, "causal_block_size": 1}, 12)):
        report = steps_of(name, num_inference_steps=8, **more)
        seen = [(row["step"], row["passname"]) for row in report.steps]
        assert seen == [(i, name) for i in range(steps) for name in ("cond", "uncond")]
        assert report.generations == 1
        assert report.fallbacks["warm-up step"] == 2 * 2 * steps // 4


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_that_leaves_the_last_timestep_out():
    name = "LTX2DFRTemporalRefinePipeline"
    report = steps_of(name, sigmas=[1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01])
    assert [row["step"] for row in report.steps] == list(range(8))
    assert report.fallbacks == EXPECTED


def test_what_costs_milliseconds_is_not_asked_at_each_forward(monkeypatch):
    def walk(*_):
        raise AssertionError("all modules are walked through")

    pipe = tiny_flux()
    handle = dit_accel.accelerate(pipe, "topk", **QUARTER)
    flux(pipe, steps=1)
    monkeypatch.setattr("dit_accel.forward.caller.transformers_of", walk)
    monkeypatch.setattr(type(pipe.transformer), "is_gradient_checkpointing", property(walk))
    monkeypatch.setattr("dit_accel.runtime.patch.Patch._bind", walk)
    flux(pipe, steps=8)
    assert handle.report().fallbacks["warm-up step"] == 2 + 4


@pytest.mark.parametrize("kind", [FluxPipeline, FluxImg2ImgPipeline])
def test_the_nearest_pipeline_is_followed_though_one_farther_off_was_seen_before(kind):
    """A loop of one's own that holds a pipeline calls its transformer, and then another one."""
    caller._KNOWN.clear()
    pipe = tiny_flux()
    handle = dit_accel.accelerate(pipe, "shared@0.3", **QUARTER)
    other = another(pipe, kind, scheduler=FlowMatchEulerDiscreteScheduler())
    ids = torch.zeros(64, 3)
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    with torch.no_grad():
        pipe.transformer(
            torch.randn(1, 64, 16),
            encoder_hidden_states=torch.zeros(1, 16, 32),
            pooled_projections=torch.zeros(1, 32),
            timestep=torch.tensor([0.5]),
            img_ids=ids,
            txt_ids=torch.zeros(16, 3),
        )
    handle.forget()
    more = {} if kind is FluxPipeline else {"image": torch.rand(1, 3, 64, 64), "strength": 0.5}
    other(
        prompt="a cat",
        height=64,
        width=64,
        num_inference_steps=8,
        output_type="latent",
        max_sequence_length=16,
        **more,
    )
    report, steps = handle.report(), 4 if more else 8
    assert [row["step"] for row in report.steps] == list(range(steps))
    assert report.fallbacks == {"warm-up step": steps // 2}
