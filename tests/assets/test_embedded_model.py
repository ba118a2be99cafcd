"""The committed model: size, genuineness, defaults."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

ASSETS = Path(__file__).resolve().parents[2] / "assets"
MODEL = ASSETS / "emoji"


def test_model_is_small() -> None:
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 36e6


def test_defaults_are_complete() -> None:
    defaults = json.loads((MODEL / "generation.json").read_text())
    assert defaults.keys() == {
        "height",
        "width",
        "num_frames",
        "num_inference_steps",
        "guidance_scale",
        "negative_prompt",
        "max_sequence_length",
        "fps",
    }


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    """The model as diffusers loads it."""
    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stock_diffusers_loads_it_in_float32(pipe: WanPipeline) -> None:
    for part in ("transformer", "vae", "text_encoder"):
        assert {p.dtype for p in getattr(pipe, part).parameters()} == {torch.float32}
    assert pipe.scheduler.config.shift == 3.0


def test_every_example_prompt_is_known(pipe: WanPipeline) -> None:
    unknown = pipe.tokenizer.unk_token_id
    for prompt in (ASSETS / "prompts.txt").read_text().splitlines():
        assert unknown not in pipe.tokenizer(prompt).input_ids, prompt


def test_prompts_decide_the_background(pipe: WanPipeline) -> None:
    call = json.loads((MODEL / "generation.json").read_text())
    call.pop("fps")
    call |= {"num_frames": 1, "num_inference_steps": 6, "output_type": "pt"}
    corners = {}
    for colour in ("yellow", "blue"):
        seed = torch.Generator().manual_seed(0)
        frame = pipe(f"rocket on a {colour} background", generator=seed, **call).frames[0, 0]
        corners[colour] = frame[:, :16, :16].mean((1, 2))
    assert corners["yellow"][0] > corners["yellow"][2] + 0.2
    assert corners["blue"][2] > corners["blue"][0] + 0.2
