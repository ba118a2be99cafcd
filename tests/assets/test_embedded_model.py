"""The committed model: size, genuineness, defaults."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from dit_accel import accelerated
from dit_accel.config import AccelConfig, resolve
from dit_accel.generation.boost import Boost
from dit_accel.inputs.scene import Vocabulary

ASSETS = Path(__file__).resolve().parents[2] / "assets"
MODEL = ASSETS / "emoji"
SLA = ASSETS / "emoji-sla"


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


def tuned(preset: str) -> AccelConfig:
    return resolve(SLA / preset)


@pytest.mark.parametrize(("preset", "keep"), [("preset.json", 0.05), ("preset-10.json", 0.1)])
def test_the_fine_tuned_sla_fits_the_model_and_changes_it(
    pipe: WanPipeline, preset: str, keep: float
) -> None:
    config, shape = tuned(preset), (1, 16, 5, 8, 8)
    layers = len(pipe.transformer.blocks)
    config.method.check(pipe.transformer.config.attention_head_dim, layers)
    assert sorted(config.method._learned) == [(0, layer) for layer in range(layers)]
    assert config.method.keep == keep and config.schedule.warmup == 0 and config.min_tokens == 0
    dense = velocity(pipe, shape)
    with Boost(lora=str(SLA / "lora")).switch_on(pipe):
        adapted = velocity(pipe, shape)
    assert adapted.isfinite().all() and not torch.equal(adapted, dense)
    assert torch.equal(velocity(pipe, shape), dense)


@pytest.mark.slow
def test_the_fine_tuned_sla_is_nearer_to_dense_than_untrained(pipe: WanPipeline) -> None:
    config, shape = tuned("preset.json"), (1, 16, 5, 48, 48)
    dense = velocity(pipe, shape)
    with Boost(lora=str(SLA / "lora")).switch_on(pipe), accelerated(pipe, config):
        found = velocity(pipe, shape)
    untrained = replace(resolve("topk/sub@0.05").method, block_q=64)
    with accelerated(pipe, replace(config, method=untrained)):
        plain = velocity(pipe, shape)
    assert torch.dist(found, dense) < 0.6 * torch.dist(plain, dense)


def velocity(pipe: WanPipeline, shape: tuple[int, ...]) -> torch.Tensor:
    """Of pure noise at a level that it was trained at."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    text, _ = pipe.encode_prompt("a large fox on a blue background", "", False)
    with torch.no_grad():
        return pipe.transformer(noise, torch.tensor([950.0]), text, return_dict=False)[0]
