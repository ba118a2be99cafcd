"""Processors that diffusers or the user exchange while a pipeline is accelerated."""

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from support import ALL, NOW, flux, flux_adapter, left_on, wan
from tiny import tiny_flux, tiny_wan
from zoo import Pipe, forward, zoo

import dit_accel
from dit_accel import TopK

EMBEDDED = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))


def load(pipe):
    state = [flux_adapter(pipe.transformer)]
    pipe.transformer._load_ip_adapter_weights(state, low_cpu_mem_usage=False)


def adapted(pipe):
    nothing = [torch.zeros(1, 1, 32)]
    return flux(pipe, ip_adapter_image_embeds=[EMBEDDED], negative_ip_adapter_image_embeds=nothing)


@pytest.fixture(scope="module")
def expected():
    """Stock latents with an IP-Adapter, and without."""
    pipe = tiny_flux(double=2, single=2)
    plain = flux(pipe)
    load(pipe)
    return adapted(pipe), plain


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("first", ["load", "accelerate"])
def test_an_ip_adapter_comes_and_goes(expected, first, strict):
    pipe = tiny_flux(double=2, single=2)
    if first == "load":
        load(pipe)
    handle = dit_accel.accelerate(pipe, TopK(**ALL), strict=strict, **NOW)
    if first == "accelerate":
        near(flux(pipe), expected[1])
        load(pipe)
    near(adapted(pipe), expected[0])
    rows = handle.report().layers
    assert all(row["sparse"] and not row["dense"] for row in rows)
    pipe.unload_ip_adapter()
    near(flux(pipe), expected[1])
    handle.restore()
    assert left_on(pipe.transformer) == [] and torch.equal(flux(pipe), expected[1])


@pytest.mark.parametrize("loaded", [False, True])
def test_restore_gives_back_the_adapter_that_was_loaded_since(expected, loaded):
    pipe = tiny_flux(double=2, single=2)
    handle = dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    load(pipe)
    if loaded:
        adapted(pipe)
    handle.restore()
    assert left_on(pipe.transformer) == [] and torch.equal(adapted(pipe), expected[0])
    pipe.unload_ip_adapter()
    assert torch.equal(flux(pipe), expected[1])


def test_a_processor_made_of_the_class_that_is_found_is_stock():
    pipe = tiny_flux()
    dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    found = pipe.transformer.attn_processors
    assert all(type(processor.__class__()) is FluxAttnProcessor for processor in found.values())
    assert all(isinstance(processor, FluxAttnProcessor) for processor in found.values())


def test_set_attn_processor_is_served_from_the_next_forward_on():
    pipe = tiny_flux()
    stock = flux(pipe)
    handle = dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    mine = FluxAttnProcessor()
    mine.note = "kept"
    pipe.transformer.set_attn_processor(mine)
    near(flux(pipe), stock)
    assert handle.report().layers[0]["sparse"] == 2
    handle.restore()
    assert left_on(pipe.transformer) == []
    assert pipe.transformer.transformer_blocks[0].attn.processor is mine
    assert vars(mine) == {"note": "kept"}


class Strange:
    """A processor that calls no attention of ours."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def test_a_processor_that_cannot_be_served_is_booked_with_its_reason():
    pipe = tiny_wan()
    handle = dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    strange = Strange()
    pipe.transformer.blocks[0].attn1.set_processor(strange)
    wan(pipe)
    why = "Strange calls neither dispatch_attention_fn nor scaled_dot_product_attention"
    assert handle.report().unplanned == {why: 4}
    handle.restore()
    assert pipe.transformer.blocks[0].attn1.processor is strange
    assert left_on(pipe.transformer) == []


def test_what_is_set_and_deleted_on_a_processor_outlives_restore():
    pipe = tiny_wan()
    attention = pipe.transformer.blocks[0].attn1
    attention.processor.old = 1
    before = attention.processor
    handle = dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    attention.processor._attention_backend = "_native_math"
    attention.processor.new = 2
    del attention.processor.old
    handle.restore()
    assert attention.processor is before and type(before) is WanAttnProcessor
    assert vars(before) == {"_attention_backend": "_native_math", "new": 2}


FUSING = ("PixArtTransformer2DModel", "AuraFlowTransformer2DModel", "CogVideoXTransformer3DModel")


@pytest.mark.parametrize("name", FUSING)
def test_projections_are_fused_and_unfused_across_restore(name):
    case = zoo()[name]
    model = case.build()
    with torch.no_grad():
        stock = forward(model, case.arguments())
        handle = dit_accel.accelerate(Pipe(model), TopK(**ALL), **NOW)
        for change in (model.fuse_qkv_projections, model.unfuse_qkv_projections):
            change()
            near(forward(model, case.arguments()), stock)
            assert not handle.report().unplanned
        model.fuse_qkv_projections()
        handle.restore()
        assert left_on(model) == []
        model.unfuse_qkv_projections()
        assert left_on(model) == []
        near(forward(model, case.arguments()), stock)


def without_rotation(
    self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
):
    """A user's own WanAttnProcessor.__call__."""
    q, k, v = transformer_wan._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
    q, k = attn.norm_q(q), attn.norm_k(k)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
    return attn.to_out[0](dispatch_attention_fn(q, k, v).flatten(2, 3))


def test_a_processor_class_and_what_its_module_names_are_as_they_are_now(monkeypatch):
    """What is patched in diffusers between two times, ours runs, too."""
    pipe = tiny_wan(layers=2)
    with dit_accel.accelerated(pipe, "dense", **NOW):
        plain = wan(pipe)
    project = transformer_wan._get_qkv_projections

    def larger(*args, **kwargs):
        q, k, v = project(*args, **kwargs)
        return q, k, v * 1.5

    for target, name, value in (
        (transformer_wan, "_get_qkv_projections", larger),
        (WanAttnProcessor, "__call__", without_rotation),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, value)
            wanted = wan(pipe)
            for _ in range(2):
                with dit_accel.accelerated(pipe, "dense", **NOW) as handle:
                    assert torch.equal(wan(pipe), wanted)
                    assert handle.report().layers[0]["dense"]
            assert not torch.equal(wanted, plain)
    with dit_accel.accelerated(pipe, "dense", **NOW):
        assert torch.equal(wan(pipe), plain)
