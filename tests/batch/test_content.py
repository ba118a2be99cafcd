"""A job is what it is made from: files that change make another clip, none under the old name."""

import json
from dataclasses import replace

import pytest
import torch
from small_batches import SMALL, go

import dit_accel
from dit_accel.batch import Settings, run
from dit_accel.batch.jobs import Job
from dit_accel.batch.reading import gather
from dit_accel.config import AccelConfig

SPARSE = {"method": {"name": "topk", "keep": 0.1}, "schedule": {"warmup": 0}, "min_tokens": 0}


def tuned(folder, value):
    """A preset of SLA with learned weights, as fine-tuning writes it."""
    folder.mkdir(exist_ok=True)
    method = dit_accel.SLA(0.4)
    learned = {"layers.0.weight": torch.eye(16) * value, "layers.0.bias": torch.zeros(16)}
    method.with_weights(learned).save(folder / "sla.safetensors")
    AccelConfig(replace(method, weights=str(folder / "sla.safetensors"))).save(
        folder / "preset.json"
    )
    return str(folder / "preset.json")


def test_weights_that_were_trained_anew_make_another_clip(tmp_path):
    first, again, other = (Job("a cat", method=tuned(tmp_path, x)).id for x in (1.0, 1.0, 2.0))
    assert first == again != other


def test_a_preset_that_changes_while_a_batch_runs_makes_nothing_under_its_old_name(pipe, tmp_path):
    preset = tmp_path / "mine.json"
    preset.write_text(json.dumps(SPARSE))
    changed = {**SPARSE, "method": {"name": "topk", "keep": 0.9}}

    def change(module, inputs):
        preset.write_text(json.dumps(changed))

    handle = pipe.transformer.register_forward_pre_hook(change)
    jobs = [{"prompt": "a cat", "seed": [1, 2, 3], "method": str(preset)}]
    summary = go(pipe, tmp_path / "out", jobs)
    handle.remove()
    assert summary.done == 1 and len(summary.failures) == 2
    assert all("has changed since the run began" in f["error"] for f in summary.failures)
    assert go(pipe, tmp_path / "out", jobs).done == 3


def test_what_is_accelerated_is_counted_for_the_check(pipe, tmp_path):
    preset = tmp_path / "sparse.json"
    preset.write_text(json.dumps(SPARSE))
    mixed = [{"prompt": "a cat", "seed": [1, 2], "method": [str(preset), "dense"]}]
    assert go(pipe, tmp_path / "mixed", mixed, check_every=2).drift["clips"] == 1
    cached = [{"prompt": "a cat", "method": "dense", "step_cache": 1e9, "steps": 6}]
    drift = go(pipe, tmp_path / "cached", cached, check_every=1).drift
    assert drift["clips"] == 1 and drift["psnr"] < 100


def test_a_folder_belongs_to_one_dtype(pipe, tmp_path):
    jobs = [{"prompt": "a cat"}]
    go(pipe, tmp_path, jobs)
    with pytest.raises(ValueError, match="holds clips of its own dtype: choose another .* bf16"):
        go(pipe, tmp_path, jobs, settings=Settings(dtype="bf16"))


def test_a_key_without_a_value_leaves_the_defaults(tmp_path):
    (parsed,) = gather([{"prompt": "a cat", "speed": None}], {"method": "dense"}).jobs
    assert parsed[1].method == "dense"


def test_what_has_no_effect_is_refused(pipe, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="timeout ends a worker process that hangs"):
        go(pipe, tmp_path / "out", [{"prompt": "a cat"}], settings=Settings(timeout=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for given in ({"workers": 5}, {"gpus": "0"}):
        with pytest.raises(ValueError, match="a launcher has started the processes"):
            run([{"prompt": "a cat"}], tmp_path / "out", defaults=SMALL, show="none", **given)
    assert not (tmp_path / "out").exists()
