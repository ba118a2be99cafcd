"""Whole runs: training helps, a resumed run is the same run, results load, bad input is refused."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

import dit_accel
from dit_accel import SLA, VSA
from dit_accel.cli import main as cli
from dit_accel.evaluate.weights import with_weights
from dit_accel.finetune import finetune
from dit_accel.finetune.checkpoint import Training, checkpoints
from dit_accel.finetune.data import LatentData
from dit_accel.finetune.loop import learning_rate
from dit_accel.finetune.student import Student, Teacher
from dit_accel.finetune.validate import Clips, velocity_error

STEPS = 20


@pytest.fixture(scope="module")
def settings(settings_of, prompts):
    return settings_of(STEPS, lr_warmup=4, ema=0.8, log_every=4, validation=prompts)


@pytest.fixture(scope="module")
def done(settings):
    return finetune(settings)


def lines(out):
    with open(f"{out}/log.jsonl") as log:
        return [json.loads(line) for line in log]


def test_the_rates_rise_and_with_a_decay_fall_at_the_end(settings):
    plain = [learning_rate(step, settings) for step in range(STEPS)]
    assert plain == [0.25, 0.5, 0.75] + [1.0] * (STEPS - 3)
    falling = replace(settings, lr_decay=0.2)
    assert [learning_rate(step, falling) for step in range(STEPS)] == plain[:-3] + [0.75, 0.5, 0.25]
    other = replace(settings, method=SLA(keep=0.3, select="power"))
    with pytest.raises(ValueError, match="was started with method="):
        settings.check_resumes(other.to_dict())
    with pytest.raises(ValueError, match="was started with steps=10"):
        falling.check_resumes(replace(falling, steps=10).to_dict())
    lora = replace(settings, train="lora", lr=1e-4)
    wider = replace(lora, adapt="blocks")
    with pytest.raises(ValueError, match="was started with adapt="):
        lora.check_resumes(wider.to_dict())
    with pytest.raises(ValueError, match="was started with adapt="):
        wider.check_resumes(lora.to_dict())


def test_training_brings_the_sparse_velocity_nearer_to_the_dense_one(settings, done):
    losses = [line["loss"] for line in lines(settings.out) if "loss" in line]
    assert len(losses) == 6 and losses[-1] + losses[-2] < 0.93 * (losses[0] + losses[1])
    before, after = done.velocity_error
    assert done.steps == STEPS and after < 0.95 * before
    validations = [line for line in lines(settings.out) if "velocity_error" in line]
    assert [line["step"] for line in validations] == [0, STEPS]
    assert all(line["clips"][0]["psnr"] > 5 for line in validations)
    assert {p.name for p in done.files} == {"sla.safetensors", "preset.json"}


def test_the_result_loads_into_sla_and_is_what_was_measured(settings, done):
    pipe = WanPipeline.from_pretrained(settings.model)
    data = LatentData(f"{settings.out}/data", "WanTransformer3DModel")
    batches = [data.draw(1, seed, 0.0) for seed in range(100, 104)]
    teacher, errors = Teacher(pipe.transformer, "projection"), {}
    for weights in (None, f"{settings.out}/sla.safetensors"):
        method = SLA(keep=0.3, weights=weights)
        tensors = method.tensors()
        assert set(tensors) == set(load_file(weights) if weights else ())
        student = Student(pipe.transformer, {n: torch.nn.Parameter(x) for n, x in tensors.items()})
        errors[weights] = velocity_error(student, teacher, batches, replace(settings))
    untrained, trained = errors.values()
    assert trained < 0.97 * untrained
    with dit_accel.accelerated(pipe, f"{settings.out}/preset.json") as handle:
        pipe(
            "a cat",
            height=128,
            width=128,
            num_frames=9,
            num_inference_steps=2,
            max_sequence_length=16,
        )
        assert any("linear" in name for name in handle.report().implementations)


def test_a_resumed_run_is_the_same_run(settings, done, tmp_path):
    half = replace(settings, out=str(tmp_path / "out"), steps=STEPS // 2, clips=0)
    finetune(half)
    assert [p.name for p in checkpoints(tmp_path / "out")] == [f"checkpoint-{STEPS // 2:08d}"]
    with pytest.raises(ValueError, match="holds a run: --resume goes on with it"):
        finetune(half)
    with pytest.raises(ValueError, match="was started with seed=0"):
        finetune(replace(half, seed=1), resume=True)
    finetune(replace(half, steps=STEPS), resume=True)
    for name in ("sla.safetensors", f"checkpoint-{STEPS:08d}/tensors.safetensors"):
        one, two = (load_file(f"{out}/{name}") for out in (settings.out, half.out))
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one), name
    one, two = (
        [(x["step"], x["loss"]) for x in lines(out) if "loss" in x]
        for out in (settings.out, half.out)
    )
    assert one == two


def test_a_finished_run_is_told_of_and_keeps_its_prompts(settings, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a rocket on red\na cat on blue\n")
    asked = replace(settings, out=str(tmp_path / "out"), prompts=str(prompts), clips=0)
    asked = replace(asked, steps=1, save_every=1, validate_every=1)
    errors = finetune(asked).velocity_error
    assert finetune(asked, resume=True).velocity_error == errors
    prompts.write_text("a dog on green\na fish on red\n")
    with pytest.raises(ValueError, match="was started with other prompts than are given now"):
        finetune(replace(asked, steps=2), resume=True)
    (tmp_path / "out" / "data" / "index.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="index.json was not written by this command"):
        finetune(asked, resume=True)


def test_files_of_the_users_stay(settings, tmp_path):
    for name in ("data/negative.safetensors", "validation/dense-0.mp4"):
        out = tmp_path / name.split("/")[0]
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match="was not written by this command"):
            finetune(replace(settings, out=str(out)))
        assert [p for p in out.rglob("*") if p.is_file()] == [out / name]
        assert (out / name).read_text() == "mine"


def test_a_run_stopped_at_its_dense_clips_begins_anew(settings, done, tmp_path, monkeypatch):
    asked = replace(settings, out=str(tmp_path / "out"), data=f"{settings.out}/data")
    asked = replace(asked, steps=1, save_every=1, validate_every=1)

    def stopped(*_):
        (tmp_path / "out" / "validation").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Clips, "_generate", stopped)
        finetune(asked)
    assert finetune(replace(asked, clips=0)).steps == 1
    assert [line["step"] for line in lines(asked.out) if "settings" in line] == [0]


def test_checkpoints_are_whole_and_of_our_names(settings, tmp_path, monkeypatch):
    weight = torch.nn.Parameter(torch.ones(2))
    training = Training({"w": weight}, {}, torch.optim.AdamW([weight]), step=1)
    for name in ("checkpoint-best", "checkpoint-00000001-good", "checkpoint-000000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("mine")
    users = {p.name for p in tmp_path.iterdir()}
    training.save(tmp_path, settings)
    training.step = 2
    training.save(tmp_path, settings)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-00000002"]
    training.save(tmp_path, settings)  # in the place of itself
    assert {p.name for p in tmp_path.iterdir()} == users | {"checkpoint-00000002"}

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", stopped)
    for training.step in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            training.save(tmp_path, settings)
    assert {p.name for p in tmp_path.iterdir()} == users | {"checkpoint-00000002"}
    assert load_file(tmp_path / "checkpoint-00000002" / "tensors.safetensors").keys() == {"live.w"}


def test_a_selector_and_a_branch_are_trained_and_load(settings, done, tmp_path):
    method = SLA(keep=0.3, linear=None, select="learned(rank=4)", branch="conv(1x3x3)")
    asked = replace(settings, out=str(tmp_path), data=f"{settings.out}/data", method=method)
    finetune(replace(asked, steps=4, save_every=2, validate_every=4, clips=0))
    weights = load_file(tmp_path / "sla.safetensors")
    for i in (0, 1):
        assert all(weights[f"layers.{i}.{name}"].any() for name in ("route_q", "route_v", "conv"))
    found = dit_accel.config.resolve(tmp_path / "preset.json").method
    assert found.tensors().keys() == weights.keys() and str(found.branch) == "conv(1x3x3)"
    other = dit_accel.Pooled(0.3, select=f"learned({tmp_path}/sla.safetensors)")
    assert other.select.stored.keys() == {"layers.0", "layers.1"}
    again = replace(asked, steps=5, save_every=2, validate_every=4, clips=0)
    assert finetune(again, resume=True).steps == 5


@pytest.mark.parametrize("train", ["full", "lora"])
def test_trained_weights_are_written_in_diffusers_format(settings, done, tmp_path, train):
    data = f"{settings.out}/data"
    asked = replace(
        settings,
        out=str(tmp_path),
        data=data,
        train=train,
        lr=1e-3,
        steps=2,
        clips=0,
        ema=0.0,
        objective="diffusion",
        accumulate=2,
        rank=2 if train == "lora" else 16,
    )
    finetune(asked)
    before = WanPipeline.from_pretrained(settings.model)
    if train == "full":
        written = tmp_path / "transformer"
        tuned = WanTransformer3DModel.from_pretrained(written)
    else:
        written = tmp_path / "lora"
        pipe = WanPipeline.from_pretrained(settings.model)
        pipe.load_lora_weights(written)
        tuned = pipe.transformer
    batch = LatentData(data, "WanTransformer3DModel").draw(1, 5, 0.0)
    with torch.no_grad():
        a, b = (
            m(batch.noisy, batch.time, **batch.conditions)[0] for m in (before.transformer, tuned)
        )
        evaluated = with_weights(before.transformer, written)(
            batch.noisy, batch.time, **batch.conditions
        )[0]
    assert not torch.equal(a, b) and (a - b).norm() < 0.5 * a.norm()
    torch.testing.assert_close(evaluated, b, rtol=1e-4, atol=1e-4)
    stored = load_file(tmp_path / "checkpoint-00000002" / "tensors.safetensors")
    assert any("attn1.to_q" in name for name in stored)
    SLA(keep=0.3, weights=str(tmp_path / "sla.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere holds no prepared data: make it with --prepare"),
        (["--keep", "2"], "keep is the share of key blocks"),
        (["--keep", "1"], "keep = 1 is dense attention"),
        (["--linear", "none"], "linear=None has no projection to train"),
        (["--method", "topk"], "topk has nothing to train: sla and vsa have"),
        (["--method", "vsa", "--combine", "gate"], "vsa has no combine: leave it out"),
        (["--method", "vsa", "--tile", "8,8,8"], "at most 128, not (8, 8, 8)"),
        (["--combine", "sum"], "combine is one of 'project', 'gate'"),
        (["--weights", "other.safetensors", "--linear", "rest"], "was trained with linear='all'"),
        (["--weights", "other.safetensors"], "but this model's head_dim makes it [64, 64]"),
        (["--prompts", "nowhere.txt"], "there is no prompt file nowhere.txt"),
        (["--model", "nowhere/at all"], "cannot load 'nowhere/at all'"),
        (["--size", "100x100"], "height is a multiple of 16 for this model"),
        (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES picks a GPU"),
        (["--steps", "0"], "steps is a number ≥ 1, not 0"),
        (["--resume"], "holds no checkpoint to resume from"),
        (["-o", "file"], "file is a file: a folder was expected"),
        (["--prepare", "nowhere", "--data", "cache"], "there is no folder of clips nowhere"),
        (
            ["--prepare", "nowhere", "--data", "self"],
            "--prepare writes to a folder: name it with --data",
        ),
    ],
)
def test_bad_input_is_one_sentence_before_training(
    settings, done, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    SLA().with_weights({"layers.0.weight": torch.ones(32, 32)}).save("other.safetensors")
    common = ["--model", settings.model, "--data", f"{settings.out}/data", "--prompts"]
    common += [settings.prompts, "--device", "cpu", "-o", "out", "--keep", "0.3"]
    assert cli.run(["finetune", *common, *options]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ") and error.count("error:") == 1
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_vsa_trains_and_its_preset_runs(settings, done, tmp_path):
    options = ["--model", settings.model, "--data", f"{settings.out}/data", "--steps", str(STEPS)]
    options += ["--method", "vsa", "--tile", "1,8,8", "--keep", "0.3", "--lr-projection", "1e-2"]
    options += ["--lr-warmup", "4", "--ema", "0.8", "--clips", "0", "--device", "cpu"]
    out = tmp_path / "vsa"
    assert cli.run(["finetune", *options, "-o", str(out)]) == 0
    assert {p.name for p in out.glob("*.*") if p.is_file()} >= {"vsa.safetensors", "preset.json"}
    errors = [line["velocity_error"] for line in lines(out) if "velocity_error" in line]
    assert errors[-1] < 0.97 * errors[0]
    pipe = WanPipeline.from_pretrained(settings.model)
    with dit_accel.accelerated(pipe, out / "preset.json") as handle:
        assert handle.config.method == VSA(
            0.3, tile=(1, 8, 8), weights=str(out / "vsa.safetensors")
        )
        pipe("a cat", height=128, width=128, num_frames=9, num_inference_steps=2,
             max_sequence_length=16)  # fmt: skip
        assert not handle.report().unplanned


def test_the_command_trains(settings, done, tmp_path, capsys):
    options = ["--model", settings.model, "--data", f"{settings.out}/data", "--steps", "1"]
    options += ["--keep", "0.3", "--clips", "0", "--device", "cpu", "-o", str(tmp_path / "o")]
    options += ["--select", "window(t=1)"]
    assert cli.run(["finetune", *options]) == 0
    assert "1 steps: velocity error to the dense model" in capsys.readouterr().out
    assert SLA(weights=str(tmp_path / "o" / "sla.safetensors")).linear == "all"
    trained = dit_accel.config.resolve(tmp_path / "o" / "preset.json").method
    assert str(trained.select) == "window(1)"
