"""A sampler asked for by a request or a job: its steps, its guidance, its place in the recipe."""

import json

import pytest
import torch
from tiny import tiny_wan

from dit_accel import TopK
from dit_accel.batch.jobs import Job
from dit_accel.batch.render import render
from dit_accel.batch.weights import Weights
from dit_accel.config import AccelConfig
from dit_accel.generation import Defaults, Request, arguments, compare, generate
from dit_accel.samplers import sampling

DEFAULTS = Defaults(64, 64, 9, 20, 5.0, max_sequence_length=16)


def test_its_steps_and_no_guidance_unless_asked():
    pipe = tiny_wan()
    usual = arguments(pipe, DEFAULTS, Request("a cat", sampler="dmd"))
    assert (usual["num_inference_steps"], usual["guidance_scale"]) == (3, 1.0)
    asked = arguments(pipe, DEFAULTS, Request("a cat", sampler="flow:5", steps=6, guidance=2.0))
    assert (asked["num_inference_steps"], asked["guidance_scale"]) == (6, 2.0)
    assert arguments(pipe, DEFAULTS, Request("a cat", sampler="flow:5"))["guidance_scale"] == 5.0
    for sampler, steps in (("ddim", None), ("dmd", 4)):
        with pytest.raises(ValueError, match="a sampler is|it was trained on, not 4"):
            Request("a cat", sampler=sampler, steps=steps)


def test_a_request_runs_it_and_gives_the_pipeline_back():
    pipe = tiny_wan()
    scheduler, request = pipe.scheduler, Request("a cat", sampler="dmd", seed=3)
    result = generate(pipe, DEFAULTS, request)
    assert pipe.scheduler is scheduler and len(result.times.steps) == 3
    with sampling(pipe, "dmd"):
        plain = pipe(**arguments(pipe, DEFAULTS, request), output_type="latent").frames
    assert torch.equal(result.latents, plain)


def test_a_comparison_names_it(tmp_path):
    config = AccelConfig(TopK(keep=0.5), min_tokens=0)
    found = compare(
        tiny_wan(), DEFAULTS, Request("a cat", sampler="renoise:3", guidance=1.0), config, tmp_path
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sampler"] == "renoise:3" and len(report["times"]["dense"]["steps"]) == 4
    assert 'install(pipe, "renoise:3")' in found.data["python"]


def test_jobs_with_a_sampler():
    plain, job = Job("a cat"), Job("a cat", sampler="dmd", method="dense")
    assert job.to_dict()["sampler"] == "dmd" and "sampler" not in plain.to_dict()
    assert plain.shape != Job("a cat", sampler="dmd").shape
    dense = Job("a cat", method="dense")
    assert dense.id == "705c0d6c95198cc9"  # as it was before there were samplers
    with pytest.raises(ValueError, match="it was trained on, not 4"):
        Job("a cat", sampler="dmd", steps=4)
    pipe = tiny_wan()
    other = Job("a rocket", sampler="dmd", method="dense", seed=4)
    together = render(Weights(pipe), DEFAULTS, [job, other], lambda *state: None)
    for one, clip in zip((job, other), together, strict=True):
        (alone,) = render(Weights(pipe), DEFAULTS, [one], lambda *state: None)
        assert abs(alone.frames.astype(int) - clip.frames.astype(int)).max() <= 1
