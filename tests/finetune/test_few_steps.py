"""Students of few steps: the target by a loop, the grid, whole runs, resumed ones, bad input."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import dit_accel
from dit_accel import SLA
from dit_accel.cli import main as cli
from dit_accel.finetune import Settings, finetune
from dit_accel.finetune.data import Batch, LatentData
from dit_accel.finetune.student import Teacher
from dit_accel.samplers import sampling

pytest.importorskip("peft")
STEPS, FEW = 24, 2


@pytest.fixture(scope="module")
def settings(settings_of):
    few = {"few_steps": FEW, "substeps": 3}
    return settings_of(STEPS, train="lora", lr=1e-2, lr_warmup=1, ema=0.5, **few)


@pytest.fixture(scope="module")
def done(settings):
    return finetune(settings)


def test_one_step_arrives_where_the_guided_steps_do(pipe, batch):
    until, negative = torch.tensor([0.1]), {"encoder_hidden_states": torch.randn(1, 16, 32)}
    batch = Batch(*list(vars(batch).values())[:5], until=until, negative=negative)
    v = Teacher(pipe.transformer, "lora", substeps=4, guidance=3.0)
    v.adapted = False  # nothing is adapted here
    x = batch.noisy
    for now, then in ((0.6, 0.475), (0.475, 0.35), (0.35, 0.225), (0.225, 0.1)):
        with torch.no_grad():
            seen, other = (
                pipe.transformer(
                    hidden_states=x,
                    timestep=torch.tensor([1000 * now]),
                    encoder_hidden_states=known["encoder_hidden_states"],
                    return_dict=False,
                )[0]
                for known in (batch.conditions, negative)
            )
        x = x + (then - now) * (other + 3.0 * (seen - other))
    arrived = batch.noisy + (0.1 - 0.6) * v.velocity(batch)
    assert torch.dist(arrived, x) / x.norm() < 1e-5
    plain = replace(batch, until=None)
    assert torch.dist(v.velocity(plain), v.velocity(batch)) > 1e-2


def test_clips_stand_at_the_beginning_of_a_step(settings, done):
    assert settings.grid == (1.0, 0.75, 0.0) and settings.drop_prompt == 0
    data = LatentData(f"{settings.out}/data", "WanTransformer3DModel")
    seen = set()
    for seed in range(20):
        batch = data.draw(2, seed, 0.0, settings.grid)
        pairs = zip(batch.sigma.tolist(), batch.until.tolist(), strict=True)
        seen |= set(pairs)
        assert torch.equal(batch.time, batch.sigma * data.index["time_scale"])
        assert batch.negative["encoder_hidden_states"].shape[0] == 2
    assert seen == {(1.0, 0.75), (0.75, 0.0)}
    assert data.draw(2, 0, 0.0).until is None


def test_training_brings_it_nearer_and_the_result_runs(settings, done):
    before, after = done.velocity_error
    assert done.steps == STEPS and after < 0.9 * before
    assert {p.name for p in done.files} == {"sla.safetensors", "preset.json", "lora"}
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(settings.model)
    pipe.load_lora_weights(f"{settings.out}/lora")
    with (
        dit_accel.accelerated(pipe, f"{settings.out}/preset.json") as handle,
        sampling(pipe, "flow:3"),
    ):
        pipe(
            "a rocket on red",
            height=128,
            width=128,
            num_frames=9,
            num_inference_steps=FEW,
            guidance_scale=1.0,
            max_sequence_length=16,
        )
        assert handle.report().kept < 1


def test_validation_clips_are_of_few_steps(settings, done):
    from dit_accel.media import metadata

    facts = metadata.read(f"{settings.out}/validation/step-{STEPS:06d}-0.mp4")
    assert (facts["sampler"], facts["arguments"]["num_inference_steps"]) == ("flow:3", FEW)
    assert facts["arguments"]["guidance_scale"] == 1.0
    dense = metadata.read(f"{settings.out}/validation/dense-0.mp4")
    assert dense["sampler"] is None and dense["arguments"]["guidance_scale"] == 3.0


def test_a_resumed_run_is_the_same_run(settings, done, tmp_path):
    half = replace(settings, out=str(tmp_path / "out"), steps=STEPS // 2, clips=0)
    finetune(half)
    with pytest.raises(ValueError, match="was started with few_steps=2"):
        finetune(replace(half, few_steps=3), resume=True)
    finetune(replace(half, steps=STEPS), resume=True)
    name = f"checkpoint-{STEPS:08d}/tensors.safetensors"
    one, two = (load_file(f"{out}/{name}") for out in (settings.out, half.out))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--few-steps", "4"], "train='lora' or 'full'"),
        (
            ["--few-steps", "4", "--train", "lora", "--objective", "diffusion"],
            "objective='teacher'",
        ),
        (["--few-steps", "0", "--train", "lora"], "few_steps is a number > 0, not 0"),
        (["--few-steps", "4", "--train", "lora", "--shift", "-1"], "shift is a number > 0"),
        (["--few-steps", "4", "--train", "lora", "--guidance", "nan"], "guidance is a finite"),
        (["--substeps", "4"], "substeps is of a student of few steps"),
        (["--lr", "1e-3"], "lr_projection is of the method's tensors"),
        (["--rank", "8"], "rank is of a LoRA, and train is 'projection': leave it out"),
        (["--adapt", "blocks", "--train", "full"], "adapt is of a LoRA, and train is 'full'"),
    ],
)
def test_bad_input_is_refused(tmp_path, capsys, words, says):
    assert cli.run(["finetune", "-o", str(tmp_path / "out"), *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_runs_of_before_can_still_be_resumed(settings):
    old = Settings(out="x")
    stored = {k: v for k, v in old.to_dict().items() if k not in ("few_steps", "substeps", "shift")}
    stored.pop("guidance")
    old.check_resumes(json.loads(json.dumps(stored)))


def test_a_share_with_the_negative_prompt_is_refused_instead_of_dropped():
    few = {"train": "lora", "method": SLA(0.3), "few_steps": 4}
    with pytest.raises(
        ValueError, match=r"sees no negative prompt: leave drop_prompt out, not 0\.3"
    ):
        Settings("out", drop_prompt=0.3, **few)
    first = Settings("out", **few)
    assert replace(first, seed=1).drop_prompt == first.drop_prompt == 0
