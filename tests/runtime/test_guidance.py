"""Guidance that acts inside of attention is honoured at sparse steps, too."""

import diffusers
import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from support import ALL, NOW, left_on
from zoo import Pipe, forward, x, zoo

import dit_accel
from dit_accel import Schedule, TopK

PERTURBED = "AttentionScoreSkipFunctionMode intercepts attention"
# what diffusers itself can skip in these models, without us
SKIPS = {
    "CogView4Transformer2DModel": ("skip_attention_scores", "skip_attention", "skip_ff"),
    "FluxTransformer2DModel": ("skip_ff",),
    "QwenImageTransformer2DModel": ("skip_attention_scores", "skip_ff"),
    "HunyuanImageTransformer2DModel": ("skip_attention_scores", "skip_ff"),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def skip(transformer, fqn, **what):
    off = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False}
    apply_layer_skip(transformer, LayerSkipConfig(indices=[0], fqn=fqn, **off | what))


@pytest.mark.parametrize("first", ["guidance", "accelerate"])
@pytest.mark.parametrize(("name", "what"), [(n, what) for n in SKIPS for what in SKIPS[n]])
def test_layer_skip_is_applied_at_sparse_steps(name, what, first):
    case, fqn = zoo()[name], "transformer_blocks"
    stock = case.build()
    plain = forward(stock, case.arguments())
    skip(stock, fqn, **{what: True})
    expected = forward(stock, case.arguments())
    assert not torch.allclose(plain, expected, rtol=1e-4, atol=1e-4)
    model = case.build()
    if first == "guidance":
        skip(model, fqn, **{what: True})
    handle = dit_accel.accelerate(Pipe(model), TopK(**ALL), **NOW)
    if first == "accelerate":
        skip(model, fqn, **{what: True})
    out = forward(model, case.arguments())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    report = handle.report()
    assert report.layers[-1]["sparse"]
    assert set(report.unplanned) == ({PERTURBED} if what == "skip_attention_scores" else set())
    handle.restore()
    assert left_on(model) == []


def test_perturbed_attention_with_strict_is_one_sentence():
    case = zoo()["QwenImageTransformer2DModel"]
    model = case.build()
    skip(model, "transformer_blocks", skip_attention_scores=True)
    dit_accel.accelerate(Pipe(model), TopK(**ALL), strict=True, **NOW)
    with pytest.raises(RuntimeError, match=f"cannot run sparse: {PERTURBED}"):
        forward(model, case.arguments())


def test_perturbed_attention_under_regional_compile():
    case, outs = zoo()["QwenImageTransformer2DModel"], []
    for accelerated in (False, True):
        torch._dynamo.reset()
        model = case.build()
        if accelerated:
            dit_accel.accelerate(Pipe(model), TopK(**ALL), **NOW)
        skip(model, "transformer_blocks", skip_attention_scores=True)
        model.compile_repeated_blocks(backend="eager")
        outs.append(forward(model, case.arguments()))
    torch._dynamo.reset()
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4 * float(outs[0].abs().max()))


def test_smoothed_energy_guidance_is_seen_by_the_method():
    case, outs = zoo()["QwenImageTransformer2DModel"], []
    for accelerated in (False, True):
        model = case.build()
        if accelerated:
            dit_accel.accelerate(Pipe(model), TopK(**ALL), **NOW)
        config = SmoothedEnergyGuidanceConfig(indices=[0], fqn="transformer_blocks")
        _apply_smoothed_energy_guidance_hook(model, config, blur_sigma=1.0)
        outs.append(forward(model, case.arguments()))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4 * float(outs[0].abs().max()))


def test_a_default_device_is_no_interception():
    case = zoo()["WanTransformer3DModel"]
    model = case.build()
    handle = dit_accel.accelerate(Pipe(model), TopK(**ALL), order="hilbert", **NOW)
    with torch.device("cpu"):
        forward(model, case.arguments())
    assert not handle.report().fallbacks


POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
# pipelines that exchange processors for the length of their call
PAG = {
    "StableDiffusion3PAGPipeline": (
        "SD3Transformer2DModel",
        diffusers.FlowMatchEulerDiscreteScheduler,
        r"transformer_blocks\.0\.attn$",
        lambda: {name: x(1, 16) for name in POOLED},
    ),
    "PixArtSigmaPAGPipeline": (
        "PixArtTransformer2DModel",
        diffusers.DDIMScheduler,
        "transformer_blocks.0",
        lambda: {
            "prompt_attention_mask": torch.ones(1, 20),
            "negative_prompt_attention_mask": torch.ones(1, 20),
            "negative_prompt": None,
            "use_resolution_binning": False,
        },
    ),
}


def perturbed(name):
    transformer, scheduler, layers, more = PAG[name]
    kind = getattr(diffusers, name)
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    pipe = kind(
        **parts
        | {"scheduler": scheduler(), "transformer": zoo()[transformer].build()}
        | {"pag_applied_layers": [layers]}
    )
    pipe.set_progress_bar_config(disable=True)

    def run(scale):
        torch.manual_seed(0)
        embeds = {"prompt_embeds": x(1, 20, 16), "negative_prompt_embeds": x(1, 20, 16)}
        return pipe(
            **embeds | more(),
            height=256,
            width=256,
            num_inference_steps=2,
            pag_scale=scale,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )[0]

    return pipe, run


@pytest.mark.parametrize("name", PAG)
def test_pipelines_with_perturbed_attention(name):
    pipe, run = perturbed(name)
    plain, stock = run(0.0), run(3.0)
    assert not torch.allclose(plain, stock, rtol=1e-3, atol=1e-3)
    handle = dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    torch.testing.assert_close(run(3.0), stock, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run(0.0), plain, rtol=1e-3, atol=1e-3)
    assert all(row["sparse"] for row in handle.report().layers)
    handle.restore()
    assert left_on(pipe.transformer) == [] and torch.equal(run(3.0), stock)


def test_warm_up_steps_see_the_perturbation_too():
    case = zoo()["QwenImageTransformer2DModel"]
    model = case.build()
    skip(model, "transformer_blocks", skip_attention_scores=True)
    expected = forward(model, case.arguments())
    handle = dit_accel.accelerate(Pipe(model, 4), "topk", schedule=Schedule(warmup=4 / 4))
    assert torch.equal(forward(model, case.arguments()), expected)
    assert handle.report().fallbacks == {"warm-up step": 2}
