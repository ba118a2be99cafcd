"""A LoRA of few steps, accelerate and a sampler, in every order: one clip, and all gone again."""

from itertools import permutations

import pytest
import torch
from runs import run
from tiny import tiny_wan

import dit_accel
from dit_accel.samplers import install

pytest.importorskip("peft")
MODULES = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.2")
CONFIG = dit_accel.AccelConfig(
    dit_accel.Pooled(keep=0.4), dit_accel.Schedule(warmup=0), min_tokens=0
)


def distilled(pipe) -> dict[str, torch.Tensor]:
    """Low-rank pairs as diffusers saves them, alpha told beside them."""
    torch.manual_seed(3)
    found = {}
    for i in range(len(pipe.transformer.blocks)):
        for module in MODULES:
            name = f"blocks.{i}.{module}"
            rows, columns = pipe.transformer.get_submodule(name).weight.shape
            found[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns) / columns**0.5
            found[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 4) / 8
    return found


def load(pipe):
    pipe.load_lora_weights(distilled(pipe), adapter_name="few")
    return pipe.unload_lora_weights


def load_and_fuse(pipe):
    load(pipe)
    pipe.fuse_lora()

    def undo():
        pipe.unfuse_lora()
        pipe.unload_lora_weights()

    return undo


def attend(pipe):
    return dit_accel.accelerate(pipe, CONFIG).restore


def sample(pipe):
    return install(pipe, "flow:5")


def few(pipe):
    return run(pipe, steps=4, guidance=1.0)


@pytest.fixture(scope="module")
def plain():
    return run(tiny_wan(heads=3), steps=4, guidance=1.0)


@pytest.fixture(scope="module")
def expected():
    """The pairs added to the weights by hand, then attention and sampler."""
    pipe = tiny_wan(heads=3)
    pairs = distilled(pipe)
    for name, down in pairs.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            up = pairs[name.replace("lora_A", "lora_B")]
            pipe.transformer.get_submodule(module).weight.data += up @ down
    attend(pipe), sample(pipe)
    return few(pipe)


@pytest.mark.parametrize("loading", [load, load_and_fuse])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_every_order(expected, plain, loading, order):
    pipe = tiny_wan(heads=3)
    ways = [loading, attend, sample]
    undo = [ways[i](pipe) for i in order]
    out = few(pipe)
    assert torch.dist(out, expected) / expected.norm() < 1e-4
    assert torch.dist(out, plain) / plain.norm() > 1e-2
    for back in undo:  # in the order they came, so that none is above those that it covers
        back()
    assert torch.dist(few(pipe), plain) / plain.norm() < 1e-5


def test_switched_off_and_on_while_attention_is_sparse(expected):
    pipe = tiny_wan(heads=3)
    attend(pipe), sample(pipe)
    without = few(pipe)
    load(pipe)
    assert torch.dist(few(pipe), expected) / expected.norm() < 1e-4
    pipe.disable_lora()
    assert torch.dist(few(pipe), without) / without.norm() < 1e-6
    pipe.enable_lora()
    assert torch.dist(few(pipe), expected) / expected.norm() < 1e-4


def test_fused_and_unfused_while_attention_is_sparse(expected):
    pipe = tiny_wan(heads=3)
    load(pipe), attend(pipe), sample(pipe)
    for fused in (True, False, True):
        pipe.fuse_lora() if fused else pipe.unfuse_lora()
        assert torch.dist(few(pipe), expected) / expected.norm() < 1e-4
    pipe.unload_lora_weights()  # fused weights stay
    assert torch.dist(few(pipe), expected) / expected.norm() < 1e-4
