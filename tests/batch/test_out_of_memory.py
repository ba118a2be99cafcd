"""A run that is out of memory: what it gives up, one thing after the other."""

import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from small_batches import events, go
from tiny import tiny_wan

import dit_accel
from dit_accel.batch import Settings, memory
from dit_accel.batch import render as render_module
from dit_accel.config import AccelConfig
from dit_accel.media import video


def test_out_of_memory_steps_down_and_says_so(pipe, tmp_path, monkeypatch):
    decode = pipe.vae.decode

    def hungry(latents, *args, **kwargs):
        if len(latents) > 1 or not pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return decode(latents, *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", hungry)
    monkeypatch.setattr(pipe.vae, "use_tiling", False)
    monkeypatch.setattr(pipe.vae, "use_slicing", False)
    summary = go(pipe, tmp_path, [{"prompt": "a cat", "seed": [1, 2, 3, 4]}], Settings(batch=4))
    assert summary.done == 4
    assert events(tmp_path, "step-down") == [
        f"out of memory: from here on {what}"
        for what in ("calls of 2 clip(s)", "calls of 1 clip(s)", "tiled decoding")
    ]
    report = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["report"]
    assert report["after_out_of_memory"] == ["calls of 1 clip(s)", "tiled decoding"]


LADDER = (
    "calls of 1 clip(s)",
    "tiled decoding",
    "parts of the model kept off the GPU while they do not run",
    "layers kept off the GPU while they do not run",
)


@pytest.mark.parametrize("rungs", [3, 4])
def test_every_step_down_is_taken_and_the_clip_is_the_same(tmp_path, monkeypatch, rungs):
    """On the CPU diffusers puts up the very hooks; they only move nothing anywhere."""
    preset = tmp_path / "topk.json"
    method = dit_accel.TopK(0.4)
    AccelConfig(method, dit_accel.Schedule(warmup=1), min_tokens=0).save(preset)
    jobs = [{"prompt": "a cat", "seed": [1, 2], "method": str(preset), "width": 128, "height": 128}]
    pipe, written = tiny_wan(), {"calm": [], "hungry": []}
    for name, frames in written.items():
        if name == "hungry":
            monkeypatch.setattr(memory, "OFFLOADING", ("cpu",))
            make_hungry(monkeypatch, rungs)
            monkeypatch.setattr(type(pipe), "enable_sequential_cpu_offload", offload_layers)
        save = video.save
        with monkeypatch.context() as patch:
            patch.setattr(video, "save", lambda p, f, *rest: frames.append(f) or save(p, f, *rest))  # noqa: B023
            assert go(pipe, tmp_path / name, jobs, Settings(batch=2)).done == 2
    out = tmp_path / "hungry"
    assert events(out, "step-down") == [
        f"out of memory: from here on {measure}" for measure in LADDER[:rungs]
    ]
    for calm, hungry in zip(written["calm"], written["hungry"], strict=True):
        assert np.abs(calm.astype(int) - hungry).max() <= 1
    reports = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert all(line["report"]["after_out_of_memory"] == [*LADDER[:rungs]] for line in reports)
    assert all(line["report"]["kept"] < 1 for line in reports)
    layers = any(p.is_meta for p in pipe.transformer.parameters())
    assert layers == (rungs == 4) and hasattr(pipe.transformer, "_hf_hook")


def test_when_nothing_is_left_to_give_up_the_job_fails_with_all_that_was_tried(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "OFFLOADING", ("cpu",))
    make_hungry(monkeypatch, len(LADDER) + 1)
    summary = go(tiny_wan(), tmp_path, [{"prompt": "a cat", "seed": [1, 2]}], Settings(batch=2))
    assert (summary.done, summary.failed) == (0, 2)
    (reason,) = {failure["error"] for failure in summary.to_dict()["failures"]}
    assert reason.startswith("OutOfMemoryError: CUDA out of memory")
    assert all(measure in reason for measure in LADDER)


def offload_layers(self, device) -> None:
    """diffusers' own asks for "cpu:0", to which a move is a copy that is no parameter any more."""
    for part in (self.text_encoder, self.transformer, self.vae):
        cpu_offload(part, device, offload_buffers=len(part._parameters) > 0)


def make_hungry(monkeypatch, rungs: int) -> None:
    """Every call is out of memory until so many measures are in force."""
    real, taken = render_module.render, []
    more = memory.Savings.more

    def render_hungry(*arguments):
        if len(taken) < rungs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return real(*arguments)

    monkeypatch.setattr(render_module, "render", render_hungry)
    monkeypatch.setattr(
        memory.Savings, "more", lambda self: (said := more(self)) and (taken.append(said) or said)
    )


def test_memory_that_never_suffices_is_a_failure_with_what_was_tried(pipe, tmp_path, monkeypatch):
    def hungry(*args, **kwargs):
        raise MemoryError("nothing left")

    monkeypatch.setattr(pipe.vae, "decode", hungry)
    monkeypatch.setattr(pipe.vae, "use_tiling", False)
    monkeypatch.setattr(pipe.vae, "use_slicing", False)
    [failure] = go(pipe, tmp_path, [{"prompt": "a cat"}]).failures
    assert failure["error"] == "MemoryError: nothing left (in force: tiled decoding)"
