"""Wan's queries and keys by one operator, and everything beside which its own code must run."""

import copy
import pickle

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from support import ALL, NOW, left_on, wan
from tiny import tiny_wan
from torch import nn
from zoo import Pipe, forward, zoo

import dit_accel
from dit_accel import TokenPruning, TopK
from dit_accel.ops import dispatch
from dit_accel.pipelines import registry

LAYERS, STEPS, PASSES = 2, 2, 2
CALLS = LAYERS * STEPS * PASSES


def made(pipe, method=None, run=wan, **options):
    """What a pipeline makes accelerated, and how many calls the operator served."""
    method = method or TopK(**ALL)
    with dispatch.recording() as used, dit_accel.accelerated(pipe, method, **NOW, **options):
        out = run(pipe)
    assert left_on(pipe.transformer) == []
    return out, sum(name.startswith("norm_rope/") for name in used)


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_every_self_attention_is_served_and_nothing_else():
    pipe = tiny_wan(layers=LAYERS)
    stock = wan(pipe)
    found, served = made(pipe)
    near(found, stock)
    assert served == CALLS and torch.equal(wan(pipe), stock)


def test_dense_is_the_pipeline_as_it_was_bit_for_bit():
    pipe = tiny_wan(layers=LAYERS)
    found, served = made(pipe, "dense")
    assert served == 0 and torch.equal(found, wan(pipe))


FAMILY = (
    "ChronoEditTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "WanAnimateTransformer3DModel",
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
)


@pytest.mark.parametrize("name", FAMILY)
def test_what_was_made_from_wan_is_served(name):
    case = zoo()[name]
    pipe = Pipe(case.build())
    assert registry.find(pipe.transformer).norm_rope
    with torch.no_grad():
        wanted = forward(pipe.transformer, case.arguments())
        run = lambda pipe: forward(pipe.transformer, case.arguments())  # noqa: E731
        found, served = made(pipe, run=run)
    near(found, wanted)
    assert served == len(registry.find(pipe.transformer).attentions(pipe.transformer))


def test_fused_projections_are_served():
    pipe = tiny_wan(layers=LAYERS)
    stock = wan(pipe)
    for block in pipe.transformer.blocks:
        block.attn1.fuse_projections()
    found, served = made(pipe)
    near(found, stock)
    assert served == CALLS


class Doubled(nn.RMSNorm):
    """A norm of the user's."""

    def forward(self, x):
        return 2 * super().forward(x)


def _other_norm(attn):
    attn.norm_q = Doubled(128, eps=attn.norm_q.eps)


def _hook(attn):
    attn.norm_k.register_forward_hook(lambda norm, args, out: 2 * out)


def _forward(attn):
    own = attn.norm_q.forward
    attn.norm_q.forward = lambda x: 2 * own(x)


def _no_weight(attn):
    attn.norm_q = nn.RMSNorm(128, eps=0.5, elementwise_affine=False)


class Mine(WanAttnProcessor):
    """A processor of the user's that norms and turns nothing."""

    def __call__(self, attn, hidden_states, *args):
        q, k, v = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        return attn.to_out[0](dispatch_attention_fn(q, k, v).flatten(2, 3))


@pytest.mark.parametrize("change", [_other_norm, _hook, _forward, _no_weight])
def test_where_a_norm_is_not_torchs_own_the_processors_code_runs(change):
    pipe = tiny_wan(layers=LAYERS)
    plain = wan(pipe)
    change(pipe.transformer.blocks[1].attn1)
    stock = wan(pipe)
    assert not torch.allclose(plain, stock, atol=1e-5)
    found, served = made(pipe)
    near(found, stock)
    assert served == CALLS // LAYERS


def test_a_processor_of_the_users_is_not_replaced():
    pipe = tiny_wan(layers=LAYERS)
    plain = wan(pipe)
    pipe.transformer.blocks[1].attn1.set_processor(Mine())
    stock = wan(pipe)
    assert not torch.allclose(plain, stock, atol=1e-5)
    found, served = made(pipe)
    near(found, stock)
    assert served == CALLS // LAYERS


@pytest.mark.parametrize("what", ["_get_qkv_projections", "__call__"])
def test_what_is_patched_in_diffusers_runs(what, monkeypatch):
    pipe = tiny_wan(layers=LAYERS)
    project = transformer_wan._get_qkv_projections
    if what == "__call__":
        monkeypatch.setattr(WanAttnProcessor, what, Mine.__call__)
    else:

        def larger(*args, **kwargs):
            q, k, v = project(*args, **kwargs)
            return q, k, v * 1.5

        monkeypatch.setattr(transformer_wan, what, larger)
    stock = wan(pipe)
    found, served = made(pipe)
    near(found, stock)
    assert served == 0


def test_code_that_names_more_than_was_known_runs_itself(monkeypatch):
    """A later diffusers whose processor does something new."""
    pipe = tiny_wan(layers=LAYERS)
    call = WanAttnProcessor.__call__
    later = call.__code__.replace(co_names=(*call.__code__.co_names, "gate"))
    monkeypatch.setattr(call, "__code__", later)
    found, served = made(pipe)
    near(found, wan(pipe))
    assert served == 0


def test_gradients_and_autocast_have_the_processors_code():
    case = zoo()["WanTransformer3DModel"]
    model = case.build().requires_grad_(True)

    def learn(pipe):
        model.zero_grad()
        forward(model, case.arguments()).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = learn(None)
    found, served = made(Pipe(model), run=learn)
    assert served == 0 and found.keys() == wanted.keys()

    def cast(pipe):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return forward(model, case.arguments())

    wanted = cast(None)
    found, served = made(Pipe(model), run=cast)
    assert served == 0
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_copies_are_served_alike():
    pipe = tiny_wan(layers=LAYERS)
    dit_accel.accelerate(pipe, TopK(**ALL), **NOW)
    wanted = wan(pipe)
    for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        pipe.transformer = again(pipe.transformer)
        with dispatch.recording() as used:
            assert torch.equal(wan(pipe), wanted)
        assert used.count("norm_rope/torch") == CALLS


def test_hunyuan_video_15_keeps_a_processor_of_the_users():
    """The other model whose processor something stands in for."""
    case = zoo()["HunyuanVideo15Transformer3DModel"]
    model = case.build()
    kind, seen = type(model.transformer_blocks[0].attn.processor), []

    class Own(kind):
        def __call__(self, *args, **kwargs):
            seen.append(dispatch_attention_fn)
            return kind.__call__(self, *args, **kwargs)

    model.transformer_blocks[0].attn.set_processor(Own())
    with torch.no_grad(), dit_accel.accelerated(Pipe(model), TopK(**ALL), **NOW):
        forward(model, case.arguments())
    assert seen


def test_pruned_tokens_are_served():
    pipe = tiny_wan(layers=4)
    half = TokenPruning(keep=0.5, start=1, end=0, first=1, last=None)
    assert made(pipe, prune=half)[1] == 4 * STEPS * PASSES
