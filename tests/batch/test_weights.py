"""A LoRA and weights in eight bits are a job's own; afterwards the pipeline has its own weights."""

from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from small_batches import SMALL, go
from tiny import saved_lora, tiny_wan

import dit_accel
from dit_accel.batch import Settings
from dit_accel.batch.jobs import Job
from dit_accel.generation import quantize
from dit_accel.generation.loading import Defaults
from dit_accel.generation.run import generate
from dit_accel.media import metadata, video

torchao = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")


def weights(pipe):
    return {name: (id(p), p.detach().clone()) for name, p in pipe.transformer.named_parameters()}


def same(before, after):
    return before.keys() == after.keys() and all(
        before[n][0] == after[n][0] and torch.equal(before[n][1], after[n][1]) for n in before
    )


def alone(pipe, job):
    """Its frames, made without a batch."""
    with job.boost.beside(pipe), dit_accel.accelerated(pipe, job.config):
        return generate(pipe, Defaults.from_pipeline(pipe), job.request()).frames


def made(folder, name):
    return video.read(folder / f"{name}.mp4")


@pytest.fixture
def noted(monkeypatch):
    """Whether a kind's check passes here, and what was put on, in turn."""
    found = []

    @contextmanager
    def put_on(kind, blocks):
        found.append(kind)
        yield
        found.append(f"no {kind}")

    monkeypatch.setattr(quantize, "quantized", put_on)
    monkeypatch.setattr(quantize, "check", lambda *_: None)
    return found


def test_a_lora_is_of_the_jobs_that_name_it(pipe, tmp_path):
    before, lora = weights(pipe), saved_lora(tmp_path / "lora")
    alike = {"prompt": "a cat", "method": "topk"}
    jobs = [
        {**alike, "name": "plain"},
        {**alike, "name": "styled", "lora": str(lora)},
        {**alike, "seed": 1, "name": "plain-1"},
    ]
    assert go(pipe, tmp_path / "out", jobs).done == 3
    assert same(before, weights(pipe))
    wanted = alone(pipe, Job(**{**SMALL, **alike}, lora=str(lora)))
    out = tmp_path / "out"
    go(pipe, tmp_path / "again", [{**alike, "name": "plain"}])
    assert np.array_equal(made(out, "plain"), made(tmp_path / "again", "plain"))
    assert not np.array_equal(made(out, "plain"), made(out, "styled"))
    assert np.abs(made(out, "styled").astype(int) - wanted).mean() < 8  # but for the codec
    facts = metadata.read(out / "styled.mp4")
    assert facts["boost"]["lora"] == str(lora)


def test_they_stay_on_for_the_next_job_and_are_off_for_a_dense_one(pipe, tmp_path, noted):
    jobs = [
        {"prompt": ["a cat", "a dog"], "quantize": "int8"},
        {"prompt": "a cat"},
        {"prompt": "a cat", "quantize": "int8", "seed": 3},
    ]
    assert go(pipe, tmp_path / "out", jobs).done == 4
    assert noted == ["int8", "no int8", "int8", "no int8"]
    noted.clear()
    checked = [{"prompt": ["a cat", "a dog"], "quantize": "int8", "method": "topk"}]
    assert go(pipe, tmp_path / "checked", checked, check_every=2).drift["clips"] == 1
    assert noted == ["int8", "no int8"], "the dense clip is a stock model's"


def test_its_id_knows_the_bytes_of_the_lora_and_the_number_format(tmp_path):
    lora = saved_lora(tmp_path / "lora")
    plain, one = Job("a cat"), Job("a cat", lora=str(lora))
    assert plain.id != one.id
    moved = Job("a cat", lora=str(lora.rename(tmp_path / "moved")))
    assert one.id == moved.id
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"other")
    assert Job("a cat", lora=str(lora)).id not in (plain.id, one.id)
    assert Job("a cat", quantize="int8").id not in (plain.id, Job("a cat", quantize="fp8").id)
    assert Job("a cat").shape != Job("a cat", quantize="int8").shape


def test_refused_in_a_sentence_before_anything_is_made(pipe, tmp_path):
    lora = str(saved_lora(tmp_path / "lora"))
    for job, settings, why in (
        ({"lora": str(tmp_path / "none")}, Settings(), "line 1: there is no LoRA at .*none: give"),
        ({"quantize": "int4"}, Settings(), "line 1: quantize is int8 or fp8, not 'int4'"),
        ({"quantize": "fp8", "lora": lora}, Settings(), "line 1: a LoRA cannot join weights in"),
        ({"lora": lora}, Settings(compile=True), "line 1: a LoRA changes the compiled blocks"),
    ):
        with pytest.raises(ValueError, match=f"(?s){why}"):
            go(pipe, tmp_path / "out", [{"prompt": "a cat", **job}], settings=settings)
        assert not (tmp_path / "out").exists()


@torchao
def test_eight_bits_are_those_of_generate(tmp_path):
    pipe = tiny_wan()
    before = weights(pipe)
    eight = {"prompt": "a cat", "method": "topk", "quantize": "int8"}
    jobs = [{**eight, "name": "eight"}, {"prompt": "a cat"}]
    assert go(pipe, tmp_path / "out", jobs).done == 2 and same(before, weights(pipe))
    wanted = alone(pipe, Job(**{**SMALL, **eight}))
    assert np.abs(made(tmp_path / "out", "eight").astype(int) - wanted).mean() < 8
