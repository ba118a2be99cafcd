"""The committed model: size, genuineness, defaults."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from dit_accel.inputs.scene import Vocabulary

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


@pytest.mark.parametrize("file", ["prompts.txt", "prompts-tuning.txt", "prompts-report.txt"])
def test_every_listed_prompt_is_a_known_pair_and_some_are_held_out(
    file: str, pipe: WanPipeline
) -> None:
    known = json.loads((MODEL / "training.json").read_text())
    kinds = set()
    for prompt in (ASSETS / file).read_text().splitlines():
        assert pipe.tokenizer.unk_token_id not in pipe.tokenizer(prompt).input_ids, prompt
        kinds.add(_is_held_out(prompt, known))
    assert kinds == {True, False}


def _is_held_out(prompt: str, known: dict) -> bool:
    """Whether a prompt asks for what the model was never trained on, by its training.json."""
    if vocabulary := Vocabulary.load(MODEL):
        scene = vocabulary.read(prompt)
        names = [thing.name for thing in scene.objects]
        colours = {scene.backdrop.colour, scene.backdrop.second}
        pairs = [pair for pair in known["held_out_pairs"] if set(pair) <= set(names)]
        return bool(pairs) or any(known["held_out"][name] in colours for name in names)
    name, _, colour = prompt.removesuffix(" background").partition(" on a ")
    assert colour in known["colours"], prompt
    return known["held_out"][name] == colour


def test_stock_defaults_of_prompt_and_text_length_are_the_models_own(pipe: WanPipeline) -> None:
    call = json.loads((MODEL / "generation.json").read_text())
    call = {k: call[k] for k in ("height", "width", "guidance_scale")}
    call |= {"num_frames": 1, "num_inference_steps": 2, "output_type": "latent"}
    own = {"negative_prompt": "", "max_sequence_length": 512}
    clips = [
        pipe("rocket on a blue background", generator=torch.Generator().manual_seed(0), **kwargs)
        for kwargs in (call, call | own)
    ]
    assert torch.equal(clips[0].frames, clips[1].frames)


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
