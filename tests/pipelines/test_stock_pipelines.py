"""Stock pipelines of diffusers, driven by prompt embeddings: steps, guidance passes, masks."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
from zoo import padding, x, zoo

import dit_accel
from dit_accel import Schedule, TopK

FLOW, BATCHED = diffusers.FlowMatchEulerDiscreteScheduler, ["cond_uncond"]
TWO, ONE = ["cond", "uncond"], ["pass0"]
ALWAYS_NONE = ("tokenizer", "text_encoder", "vae")
IMAGE = {"height": 256, "width": 256}
VIDEO = {"height": 128, "width": 128, "num_frames": 9}


def embeds(dim=16, masks=None, lengths=(12, 5), **more):
    """A prompt of 20 tokens and a negative one; `masks` names their padding."""
    out = {"prompt_embeds": x(1, 20, dim), "negative_prompt_embeds": x(1, 20, dim), **more}
    if masks:
        out[masks], out[f"negative_{masks}"] = (padding(length) for length in lengths)
    return out


class Processor:
    """What Qwen-Image 2.1 asks when it is made, though prompts come embedded."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *args, **options):
        return [[0]]


MASKS = "prompt_attention_mask"
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
# pipeline: transformer, scheduler, call, passes of a step
PIPELINES = {
    "LTXPipeline": (
        "LTXVideoTransformer3DModel",
        FLOW,
        lambda: embeds(masks=MASKS, **IMAGE, num_frames=17, guidance_scale=3.0),
        BATCHED,
    ),
    "CogVideoXPipeline": (
        "CogVideoXTransformer3DModel",
        diffusers.CogVideoXDDIMScheduler,
        lambda: embeds(**VIDEO, guidance_scale=3.0),
        BATCHED,
    ),
    "MochiPipeline": (
        "MochiTransformer3DModel",
        FLOW,
        lambda: embeds(masks=MASKS, **VIDEO | {"num_frames": 13}, guidance_scale=3.0),
        BATCHED,
    ),
    "HunyuanVideoPipeline": (
        "HunyuanVideoTransformer3DModel",
        FLOW,
        lambda: {
            "prompt_embeds": x(1, 20, 16),
            "pooled_prompt_embeds": x(1, 8),
            MASKS: padding(12).long(),
            **VIDEO,
        },
        ["cond"],
    ),
    "StableDiffusion3Pipeline": (
        "SD3Transformer2DModel",
        FLOW,
        lambda: embeds(**IMAGE, **{name: x(1, 16) for name in POOLED}),
        ONE,
    ),
    "QwenImagePipeline": (
        "QwenImageTransformer2DModel",
        FLOW,
        lambda: {
            "prompt_embeds": x(1, 20, 16),
            "negative_prompt_embeds": x(1, 9, 16),
            "true_cfg_scale": 3.0,
            **IMAGE,
        },
        TWO,
    ),
    "PixArtAlphaPipeline": (
        "PixArtTransformer2DModel",
        diffusers.DDIMScheduler,
        lambda: embeds(masks=MASKS, **IMAGE, negative_prompt=None, use_resolution_binning=False),
        ONE,
    ),
    "CogView4Pipeline": (
        "CogView4Transformer2DModel",
        FLOW,
        lambda: embeds(**IMAGE) | {"negative_prompt_embeds": x(1, 32, 16)},
        TWO,
    ),
    "Lumina2Pipeline": (
        "Lumina2Transformer2DModel",
        FLOW,
        lambda: embeds(masks=MASKS, **IMAGE),
        ["pass0", "pass1"],
    ),
    "ZImagePipeline": (
        "ZImageTransformer2DModel",
        FLOW,
        lambda: {"prompt_embeds": [x(12, 16)], "negative_prompt_embeds": [x(5, 16)], **IMAGE},
        ONE,
    ),
    "QwenImage21Pipeline": (
        "QwenImage21Transformer2DModel",
        FLOW,
        lambda: embeds(masks="prompt_embeds_mask", **IMAGE, true_cfg_scale=3.0),
        TWO,
    ),
    "Flux2Pipeline": (
        "Flux2Transformer2DModel",
        FLOW,
        lambda: {"prompt_embeds": x(1, 20, 16), **IMAGE},
        ONE,
    ),
}


def build(name):
    transformer, scheduler, call, _ = PIPELINES[name]
    kind = getattr(diffusers, name)
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    parts = dict.fromkeys(n for n in names if n.split("_2")[0].split("_3")[0] in ALWAYS_NONE)
    if "processor" in names:
        parts["processor"] = Processor()
    pipe = kind(scheduler=scheduler(), transformer=zoo()[transformer].build(), **parts)
    pipe.set_progress_bar_config(disable=True)

    def run():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        arguments = {**call(), "num_inference_steps": 3, "generator": generator}
        with torch.no_grad():
            return pipe(**arguments, output_type="latent")[0]

    return pipe, run


@pytest.mark.parametrize("name", PIPELINES)
def test_steps_and_passes_are_followed_and_all_blocks_equal_dense(name):
    pipe, run = build(name)
    stock, passes = run(), PIPELINES[name][3]
    options = {"schedule": Schedule(warmup=1), "min_tokens": 0}
    with dit_accel.accelerated(pipe, TopK(keep=0.999), **options) as handle:
        out = run()
        report = handle.report()
    torch.testing.assert_close(out, stock, rtol=1e-3, atol=1e-3)
    seen = [(row["step"], row["passname"]) for row in report.steps]
    assert seen == [(step, name) for step in range(3) for name in passes]
    assert not report.unplanned and report.generations == 1
    assert set(report.fallbacks) == {"warm-up step"}
    assert torch.equal(run(), stock)


def test_an_additive_bias_runs_dense_and_says_so():
    transformer = zoo()["ChromaTransformer2DModel"].build()
    parts = dict.fromkeys(ALWAYS_NONE)
    pipe = diffusers.ChromaPipeline(scheduler=FLOW(), transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    masks = {MASKS: padding(12).float(), f"negative_{MASKS}": padding(5).float()}
    with (
        torch.no_grad(),
        dit_accel.accelerated(pipe, TopK(), schedule=Schedule(warmup=0), min_tokens=0) as handle,
    ):
        pipe(**embeds(**masks), **IMAGE, num_inference_steps=1, output_type="latent")
        report = handle.report()
    assert report.unplanned == {"the attention mask is an additive bias": 4}
