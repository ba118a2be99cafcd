"""A tiny saved Wan whose attention is peaked enough that dropping key blocks matters."""

import pytest
import torch
from tiny import tiny_wan

from dit_accel import SLA
from dit_accel.finetune import Settings
from dit_accel.finetune.data import Batch
from dit_accel.generation.loading import GENERATION

DEFAULTS = (
    '{"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 2, "fps": 8,'
    ' "max_sequence_length": 16, "guidance_scale": 3.0, "negative_prompt": "dog"}'
)


def peaked_wan():
    """Attention that looks at few keys and weighs much in the output: 192 tokens, 3 blocks."""
    pipe = tiny_wan()
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.weight.data *= 8
        block.attn1.to_out[0].weight.data *= 20
    return pipe


@pytest.fixture
def pipe():
    return peaked_wan()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peaked")
    peaked_wan().save_pretrained(folder)
    (folder / GENERATION).write_text(DEFAULTS)
    return str(folder)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("# a comment\na rocket on red\n\na cat on blue\n")
    return str(file)


@pytest.fixture(scope="module")
def settings_of(model, prompts, tmp_path_factory):
    """Settings of a short run by its number of steps, saved half-way and validated at its ends."""

    def settings(steps, **options):
        return Settings(
            out=str(tmp_path_factory.mktemp("run") / "out"),
            model=model,
            prompts=prompts,
            samples=2,
            method=SLA(keep=0.3),
            steps=steps,
            lr_projection=1e-2,
            save_every=steps // 2,
            validate_every=steps,
            clips=1,
            device="cpu",
            **options,
        )

    return settings


@pytest.fixture
def batch():
    x, noise = torch.randn(2, 1, 16, 3, 16, 16)
    text = torch.randn(1, 16, 32)
    sigma = torch.tensor([0.6])
    return Batch(x, noise, sigma, sigma * 1000, {"encoder_hidden_states": text})
